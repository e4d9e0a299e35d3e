"""Side effects: the divergence by numpy, intervals on known truth, and a whole run with known answers."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import special, stats

from backtrack_jax import checks, pipeline
from backtrack_jax.analysis import side_effects
from backtrack_jax.analysis.backtracking import count_keywords
from backtrack_jax.analysis.divergence import kl_per_token
from backtrack_jax.analysis.side_effects import SIDE_EFFECTS, magnitude
from backtrack_jax.conditions import wanted_conditions
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.data.answers import is_right
from backtrack_jax.files import store, tables
from backtrack_jax.intervention import add_vector, gaussian_noise, no_intervention, stack_rows
from backtrack_jax.models import checkpoint
from backtrack_jax.report.stage import read_results

D, L = 16, 3


def experiment(**settings: Any) -> Experiment:
    e = tiny.get_config()
    e.questions.ask = ("side_effects",)
    e.questions.side_effects = dataclasses.replace(e.questions.side_effects, **settings)
    return e


@pytest.fixture(scope="module")
def rows() -> tuple[list[list[int]], list[list[int]], list[Any]]:
    """Prompts and replies of several lengths, and edits over several spans."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 250, n).tolist() for n in (3, 5, 4, 6, 2)]
    replies = [rng.integers(0, 250, n).tolist() for n in (6, 2, 4, 0, 3)]
    v = jnp.asarray(rng.standard_normal(D), jnp.float32)
    v /= jnp.linalg.norm(v)
    edits = [
        add_vector(v, 1, 5.0, n_layers=L),
        no_intervention(L, D),
        add_vector(v, 0, -4.0, n_layers=L, span="generated"),
        add_vector(v, 0, 4.0, n_layers=L),
        add_vector(v, 2, 3.0, n_layers=L, span="prompt"),
    ]
    return prompts, replies, edits


@pytest.mark.slow
def test_divergence_is_that_of_numpy(finished: Path, rows: tuple[list[Any], list[Any], list[Any]]) -> None:
    """And the same in batches of another size; of an edit that changes nothing it is 0, without a reply not defined."""
    prompts, replies, edits = rows
    model = checkpoint.load("reasoning", dtype="float32")
    found = {}
    for size in (2, 5):
        batches = kl_per_token(model, prompts, replies, edits, batch_size=size)
        found[size] = [value for _, value in sorted(pair for batch in batches for pair in batch)]
    np.testing.assert_allclose(found[2], found[5], rtol=1e-4, atol=1e-6)
    for prompt, reply, edit, value in zip(prompts, replies, edits, found[2], strict=True):
        ids = jnp.asarray([[*prompt, *reply]])
        positions = jnp.arange(ids.shape[1])[None]
        p, q = (
            special.log_softmax(
                np.asarray(model.logits(model(ids, positions, intervention=e).resid), np.float64)[0], -1
            )
            for e in (None, stack_rows([edit]).resolve(jnp.asarray([len(prompt)])))
        )
        kl = np.sum(np.exp(p) * (p - q), -1)[len(prompt) - 1 : -1]
        assert value == pytest.approx(kl.mean() if reply else math.nan, rel=1e-4, abs=1e-6, nan_ok=True)
    assert abs(found[2][1]) < 1e-6 and found[2][0] > 0.01 and math.isnan(found[2][3])


def test_done_batches_are_left_out_and_bad_rows_named(
    finished: Path, rows: tuple[list[Any], list[Any], list[Any]]
) -> None:
    prompts, replies, edits = rows
    model = checkpoint.load("reasoning", dtype="float32")
    assert not list(kl_per_token(model, prompts, replies, edits, batch_size=2, done=range(5)))
    noise = gaussian_noise(1, 3.0, n_layers=L, d_model=D)
    noisy = dataclasses.replace(noise, key=jax.random.key(1))
    mixed = [
        pair for batch in kl_per_token(model, prompts, replies, [*edits[:4], noisy], batch_size=5) for pair in batch
    ]
    assert sorted(row for row, _ in mixed) == [0, 1, 2, 3, 4] and dict(mixed)[4] > 0.01
    with pytest.raises(ValueError, match="row 1"):
        list(kl_per_token(model, prompts, [replies[0], [10**6], *replies[2:]], edits, batch_size=2))
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.dtype == jnp.float32 else leaf, model)
    with pytest.raises(FloatingPointError, match=r"row \d are not finite"):
        list(kl_per_token(broken, prompts, replies, edits, batch_size=2))


def test_no_inferiority_is_seen_where_there_is_none_and_rarely_where_there_is() -> None:
    """Accuracy .7 of 300 problems, whose replies agree in part: the interval holds the truth, and decides .1."""
    rng = np.random.default_rng(5)
    held, decided = {}, {}
    for truth in (0.0, -0.1):
        found = []
        for _ in range(300):
            easy = rng.uniform(size=300) < 0.5
            p = np.where(easy, 0.95, 0.45)
            plain, steered = rng.uniform(size=300) < p, rng.uniform(size=300) < p + truth
            of = [{f"p{n}": (float(x), 1) for n, x in enumerate(values)} for values in (steered, plain)]
            line = side_effects._change("right", *of)
            assert line["right_change"] == pytest.approx(np.mean(steered) - np.mean(plain))
            found.append((line["right_change_low"], line["right_change_high"], line["right_low_claim"]))
        low, high, of_claim = np.array(found).T
        held[truth] = np.mean((low <= truth) & (truth <= high))
        decided[truth] = np.mean(of_claim > -0.1)
    assert all(0.91 < share < 0.99 for share in held.values())
    assert decided[0.0] > 0.6 and decided[-0.1] < 0.08


@pytest.mark.slow
def test_a_run_that_asks(finished: Path) -> None:
    """Counts by hand from the replies; the control is sampled on both models; resumes from what it had done."""
    own_traces = records.read_traces(finished / "1-traces" / "traces.jsonl")
    lines = [
        {"id": t.problem_id, "category": t.category, "problem": t.problem, "answer": ("no", "two")[n % 2]}
        for n, t in enumerate({t.problem_id: t for t in own_traces}.values())
    ]
    lines[0]["answer"] = ""
    Path("known.json").write_text(json.dumps(lines))
    answers = {line["id"]: line["answer"] for line in lines}
    e = experiment(texts=2)
    e.traces.problems, e.steering.baselines = "known.json", ()
    e.steering.kinds = ("backtracking", "noise")
    checks.check(e)
    assert magnitude(e) == 8.0 and {w.target for w in wanted_conditions(e)} == {"base", "reasoning"}
    pipeline.Run(e).run()

    replies = [records.Reply.from_line(x) for x in store.read_lines(finished / "4-steering" / "generations.jsonl")]
    table = tables.read(finished / "5-analysis" / "side_effects.csv")
    assert {(x["target"], x["kind"], x["source"], x["magnitude"]) for x in table} == {
        (reply.condition.target, reply.condition.kind, reply.condition.source, reply.condition.magnitude)
        for reply in replies
        if reply.condition.layer == 1 and reply.condition.window in ("", "-5..-2")
    }
    plain = {
        role: [r for r in replies if (r.condition.target, r.condition.kind) == (role, "unsteered")]
        for role in ("base", "reasoning")
    }

    def right(reply: records.Reply) -> bool:
        behind = reply.text.partition("</think>")[2]
        given = behind or (reply.text if reply.finish_reason == "stop" else "")
        return bool(given) and is_right(given, answers[reply.problem_id])

    for line in table:
        members = [reply for reply in replies if reply.condition == records.Condition.of(line)]
        with_answer = [reply for reply in members if answers[reply.problem_id]]
        assert line["n_replies"] == len(members) and line["n_known"] == len({r.problem_id for r in with_answer})
        assert line["right"] == pytest.approx(np.mean([right(reply) for reply in with_answer]))
        corrected = [right(reply) and count_keywords(reply.text).hits > 0 for reply in with_answer]
        assert line["corrected"] == pytest.approx(np.mean(corrected))
        assert line["cut"] == pytest.approx(np.mean([reply.finish_reason == "length" for reply in members]))
        lengths = [[len(reply.ids) for reply in of] for of in (members, plain[line["target"]])]
        assert line["tokens_change"] == pytest.approx(np.mean(lengths[0]) - np.mean(lengths[1]))
    kl = tables.read(finished / "5-analysis" / "reasoning.side_effects_kl.csv")
    for line in (x for x in table if x["target"] == "reasoning" and x["kind"] != "unsteered"):
        values = [x["kl"] for x in kl if records.Condition.of(x) == records.Condition.of(line)]
        assert line["n_texts"] == len(values) == 2 and line["kl"] == pytest.approx(np.mean(values))
        ends = stats.t.interval(0.95, 1, np.mean(values), stats.sem(values))
        assert (line["kl_low"], line["kl_high"]) == pytest.approx(ends)

    r = read_results(e, finished)
    (claim,), (sentence,) = SIDE_EFFECTS.claims(r), SIDE_EFFECTS.sentences(r)
    assert (claim.name, claim.verdict, claim.where) == ("accuracy", "undecided", "-") and "right answers" in sentence
    r.tables["side_effects"] = [x | {"n_known": 0} for x in r.tables["side_effects"]]
    (claim,), (sentence,) = SIDE_EFFECTS.claims(r), SIDE_EFFECTS.sentences(r)
    assert claim.name == "disturbance" and "nats per token" in sentence
    both = side_effects.kl_contrast(r)
    assert both.shape == (2, 2) and claim.estimate == pytest.approx((both[:, 0] - both[:, 1]).mean())
    assert (finished / "6-report" / "side_effects.png").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"margin": 0.0}, r"questions\.side_effects\.margin=0\.0, expected a share between 0 and 1"),
        ({"margin": 6.0}, r"questions\.side_effects\.margin=6\.0"),
        ({"texts": -1}, r"questions\.side_effects\.texts=-1, expected at least 0"),
        ({"magnitude": -4.0}, r"questions\.side_effects\.magnitude=-4\.0, expected a positive one"),
        ({"magnitude": 3.0}, r"questions\.side_effects\.magnitude=3\.0, expected a positive one"),
    ],
)
def test_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    e = experiment(**changed)
    with pytest.raises(ValueError, match=message):
        checks.check(e)
    e.questions.ask = ()
    checks.check(e)


def test_sweeps_that_leave_nothing_to_compare_with_are_refused() -> None:
    e = experiment()
    e.steering.magnitudes = (8.0,)
    with pytest.raises(ValueError, match=r"steering\.magnitudes=\(8\.0,\), expected 0 among them"):
        checks.check(e)
    e = experiment()
    e.steering.kinds = ("noise",)
    with pytest.raises(ValueError, match=r"steering\.kinds=\('noise',\), expected vectors\.label='backtracking' among"):
        checks.check(e)
