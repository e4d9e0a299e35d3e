"""Log-odds of keywords on given text: against torch, and which texts, conditions and sentences count."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from torch_reference import CONFIG, added, tiny_llama, torch_copy, torch_logits, unit_vectors

from backtrack_jax import pipeline
from backtrack_jax.analysis import forced, log_odds
from backtrack_jax.analysis.forced import BASE_REPLIES, REASONING_TRACES, Forced, texts_of
from backtrack_jax.analysis.log_odds import EXAMPLES
from backtrack_jax.data.records import UNSTEERED, Condition, Reply
from backtrack_jax.files import tables
from backtrack_jax.intervention import add_vector, no_intervention
from backtrack_jax.report.stage import read_results
from backtrack_jax.stages.analysis import gather

N_TEXTS = tiny.get_config().analysis.forced_texts
L, D, V = CONFIG.n_layers, CONFIG.d_model, CONFIG.vocab_size
KEYWORDS = frozenset({5, 17, 200})
RNG = np.random.default_rng(0)
LENGTHS = ((6, 9), (3, 4), (20, 70), (1, 12), (2, 3))  # of prompt and text
STARTS = ((9, 6, 14), (4,), (20, 33, 50, 89), (2, 12), ())


def text(row: int, intervention=None) -> Forced:
    ids = RNG.integers(0, V, sum(LENGTHS[row])).tolist()
    return Forced(ids, LENGTHS[row][0], STARTS[row], intervention or no_intervention(L, D))


def measured(rows: list[Forced], batch_size: int = 2, **kwargs) -> dict[int, float]:
    found = log_odds.keyword_log_odds(tiny_llama(), rows, KEYWORDS, batch_size=batch_size, **kwargs)
    return {row: value for batch in found for row, value in batch}


def expected(logits: np.ndarray, starts) -> float:
    """By hand, from probabilities: mean of log(p / (1 - p)) at the tokens before the starts."""
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    keyword = p[:, sorted(KEYWORDS)].sum(-1)
    return float(np.mean([np.log(keyword[at - 1] / (1 - keyword[at - 1])) for at in starts]))


@pytest.mark.hf
def test_log_odds_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several lengths, spans and vectors in one batch, with logits in one piece and position by position."""
    reference = torch_copy(tiny_llama())
    vector = np.asarray(unit_vectors(1, D)[0])
    spans = ("all", "prompt", "generated", "all", "all")
    rows = [
        text(i, add_vector(jnp.asarray(vector), 1, 4.0, n_layers=L, span=span) if i != 3 else None)
        for i, span in enumerate(spans)
    ]
    for at_once in (1 << 27, 1):
        monkeypatch.setattr(forced, "_LOGITS_AT_ONCE", at_once)
        jax.clear_caches()
        found = measured(rows)
        assert sorted(found) == [0, 1, 2, 3, 4] and math.isnan(found[4])
        for row, span in enumerate(spans[:4]):
            prompt, length = LENGTHS[row]
            columns = {"all": (0, prompt + length), "prompt": (0, prompt), "generated": (prompt, prompt + length)}[span]
            with added(reference, 1, 0.0 * vector if row == 3 else 4.0 * vector, columns):
                logits = torch_logits(reference, rows[row].ids)
            assert found[row] == pytest.approx(expected(logits, STARTS[row]), rel=1e-4)


def test_strength_zero_and_another_place_in_a_batch_change_nothing() -> None:
    vector = unit_vectors(1, D)[0]
    rows = [text(i) for i in range(4)]
    plain = measured(rows)
    zero = [dataclasses.replace(row, intervention=add_vector(vector, 1, 0.0, n_layers=L)) for row in rows]
    assert measured(zero) == plain
    mixed = measured([zero[2], dataclasses.replace(rows[2], intervention=add_vector(vector, 1, 9.0, n_layers=L))])
    assert mixed[0] == pytest.approx(plain[2], rel=1e-6) and abs(mixed[1] - plain[2]) > 1e-3


def test_finished_batches_are_left_out() -> None:
    rows = [text(i) for i in range(4)]
    whole = list(log_odds.keyword_log_odds(tiny_llama(), rows, KEYWORDS, batch_size=2))
    done = {row for row, _ in whole[0]}
    assert list(log_odds.keyword_log_odds(tiny_llama(), rows, KEYWORDS, batch_size=2, done=done)) == whole[1:]


def test_what_cannot_be_measured_is_named() -> None:
    good = text(0)
    for row, message in (
        (dataclasses.replace(good, ids=[*good.ids[:-1], V]), rf"row 1 has the token id {V}"),
        (dataclasses.replace(good, starts=(0,)), r"row 1 has the starts \[0\], expected 1 to 15"),
        (dataclasses.replace(good, starts=(16,)), r"row 1 has the starts \[16\], expected 1 to 15"),
    ):
        with pytest.raises(ValueError, match=message):
            measured([good, row])
    with pytest.raises(FloatingPointError, match="logits of row 1 are not finite"):
        broken = add_vector(jnp.full(D, 1e38), 1, 3e38, n_layers=L)
        measured([good, dataclasses.replace(good, intervention=broken)])


def test_every_condition_reads_the_same_texts(finished: Path) -> None:
    """And sentences: none before the first of the text, or in the examples of the positive control."""
    made = pipeline.Run(tiny.get_config())
    material = gather(made.context)
    e = material.experiment
    for role in e.roles:
        lines, rows = log_odds.forced_rows(material, role)
        asked: dict[Condition, set[str]] = {}
        for reply in material.replies:
            if reply.condition.target == role:
                asked.setdefault(reply.condition, set()).add(reply.problem_id)
        compared = 0
        by_text: dict[tuple[str, str], list[int]] = {}
        for number, line in enumerate(lines):
            assert line["target"] == role and line["n_starts"] == len(rows[number].starts)
            by_text.setdefault((line["text"], line["problem_id"]), []).append(number)
        assert {source for source, _ in by_text} == {REASONING_TRACES, BASE_REPLIES}
        assert len([1 for source, _ in by_text if source == REASONING_TRACES]) == N_TEXTS
        for (source, problem), numbers in by_text.items():
            kinds = [lines[number]["kind"] for number in numbers]
            assert kinds.count(EXAMPLES) == kinds.count(UNSTEERED) == 1
            texts = {tuple(rows[n].ids) for n, kind in zip(numbers, kinds, strict=True) if kind != EXAMPLES}
            assert len(texts) == 1, (source, problem)
            (ids,) = texts
            control = rows[numbers[kinds.index(EXAMPLES)]]
            own = rows[numbers[kinds.index(UNSTEERED)]]
            assert len(control.starts) == len(own.starts) and not control.intervention.terms
            if not own.starts:
                continue
            compared += 1
            assert len(control.ids) > len(ids) + 5
            assert own.prompt_length == control.prompt_length < min([*own.starts, len(ids)])
            if source == BASE_REPLIES:  # a random model samples tokens that an encoder would not choose
                continue
            assert [control.ids[at - 1] for at in control.starts] == [ids[at - 1] for at in own.starts]
            shown = len(control.ids) - len(ids)
            assert all(at - own_at == shown for at, own_at in zip(control.starts, own.starts, strict=True))
        assert compared > 1
        read = Counter(Condition.of(line) for line in lines if line["kind"] != EXAMPLES)
        assert read == {condition: 2 * len(problems) for condition, problems in asked.items()}


def test_a_reply_in_which_bos_was_sampled_is_no_text(finished: Path) -> None:
    """It has more than the one BOS that a model reads; another reply to the problem stands in, if there is one."""
    material = gather(pipeline.Run(tiny.get_config()).context)
    bos = material.tokenizer.bos_id
    assert bos is not None
    before = texts_of(material)[BASE_REPLIES]

    def with_bos(reply: Reply, *samples: int) -> Reply:
        of = reply.condition.kind == UNSTEERED and reply.problem_id == before[0].problem_id and reply.sample in samples
        return dataclasses.replace(reply, ids=(*reply.ids, bos)) if of else reply

    for samples, expected in (((0,), 1), ((0, 1), None)):
        replies = [with_bos(reply, *samples) for reply in material.replies]
        found = {t.problem_id: t for t in texts_of(dataclasses.replace(material, replies=replies))[BASE_REPLIES]}
        own = found.get(before[0].problem_id)
        assert (own.sample if own else None) == expected and len(found) == len(before) - (own is None)


def test_the_effect_is_the_difference_from_the_unsteered_model(finished: Path) -> None:
    r = read_results(tiny.get_config(), finished)
    written = tables.read(finished / "5-analysis" / "reasoning.log_odds.csv")
    cell = {"kind": "backtracking", "source": "base", "layer": 1, "window": "-5..-2", "magnitude": 8.0}
    found = log_odds.effects(r, "reasoning", REASONING_TRACES, **cell)
    assert len(found) == N_TEXTS
    for problem, effect in found.items():
        own = [line for line in written if (line["problem_id"], line["text"]) == (problem, REASONING_TRACES)]
        (plain,) = (line["log_odds"] for line in own if line["kind"] == UNSTEERED)
        (steered,) = (line["log_odds"] for line in own if all(line[name] == value for name, value in cell.items()))
        assert effect == steered - plain and effect
    pairs = log_odds.paired_effects(r, REASONING_TRACES, "base", 8.0)
    assert pairs.shape == (N_TEXTS, 2)
    np.testing.assert_array_equal(pairs[:, 1], list(found.values()))
