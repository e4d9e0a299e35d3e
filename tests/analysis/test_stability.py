"""Boundaries that recur: against known chances, against the model itself, and every table by other code."""

import dataclasses
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import optimize, special, stats

from backtrack_jax import checks, generate, pipeline, plan
from backtrack_jax.analysis import boundaries, boundary_vectors, stability
from backtrack_jax.analysis.base import Material
from backtrack_jax.analysis.boundaries import LABELLED, REFERENCE, THIRDS, Boundary
from backtrack_jax.analysis.log_odds import given_text
from backtrack_jax.analysis.results import Results
from backtrack_jax.config import Experiment
from backtrack_jax.data.records import Annotation, Rejection, Section, Trace
from backtrack_jax.data.text import sentence_spans
from backtrack_jax.files import tables
from backtrack_jax.files.tables import Table
from backtrack_jax.intervention import add_vector
from backtrack_jax.models.batching import right_pad
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.report import interactive, static
from backtrack_jax.report.stage import read_results
from backtrack_jax.stages.analysis import gather

LAYER, DRAWS, RANDOM, TEXTS, FOLDS = 1, 4, 3, 3, 5


def experiment(**settings: Any) -> Experiment:
    """The tiny experiment with the question asked."""
    e = tiny.get_config()
    e.questions.ask = ("stability",)
    e.traces.temperature = 1.0
    q = e.questions.stability
    q.draws, q.tokens, q.random = DRAWS, 1, RANDOM
    for name, value in settings.items():
        setattr(q, name, value)
    return e


@pytest.fixture(scope="module")
def made(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Material, Path]]:
    """Material whose model says wait after some boundaries and not after others, and the folder of the tables."""
    folder = tmp_path_factory.mktemp("stability") / "tiny"
    shutil.copytree(tiny_run, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        silent = gather(pipeline.Run(experiment()).context)
        model = outspoken(silent)
        material = dataclasses.replace(silent, model=lambda role: model)
        written = folder / "tables"
        written.mkdir()
        for role in ("base", "reasoning"):
            for name, lines in stability.STABILITY.of_role(material, role, written).items():
                tables.write(written / f"{role}.{name}.csv", lines)
        for name, lines in stability.STABILITY.finish(material, written).items():
            tables.write(written / f"{name}.csv", lines)
        yield material, written


def outspoken(material: Material) -> Decoder:
    """The model with another unembedding of " wait", under which its chance varies between the boundaries."""
    silent = material.model("reasoning")
    prefixes = [place.prefix for place in boundaries.choose(material, "reasoning")]
    ids, positions = map(jnp.asarray, right_pad(prefixes, max(map(len, prefixes))))
    x = np.asarray(silent.norm(silent(ids, positions).resid))[np.arange(len(ids)), [len(p) - 1 for p in prefixes]]
    varies = np.linalg.svd(x - x.mean(0), full_matrices=False)[0][:, 0]
    row = np.linalg.lstsq(x, 5 + 2 * varies / varies.std(), rcond=None)[0]
    model = jax.tree.map(lambda leaf: leaf, silent)
    weight = model.lm_head.weight
    weight[...] = weight[...].at[tiny.word_id(" wait")].set(jnp.asarray(row, jnp.float32))
    return model


def table(made: tuple[Material, Path], name: str) -> Table:
    return tables.read(made[1] / f"{name}.csv")


def results(made: tuple[Material, Path]) -> Results:
    """Of the tiny run, with the tables of the question."""
    r = read_results(tiny.get_config(), made[1].parent / "results" / "tiny")
    names = ("stability_shares", "stability_counts", "stability_vectors")
    own = {name: table(made, name) for name in names} | {
        name: table(made, f"reasoning.{name}") for name in ("stability", "stability_effects")
    }
    return dataclasses.replace(r, experiment=experiment(), tables=r.tables | own)


def lines_of(p: np.ndarray, problems: Sequence[str], rng: np.random.Generator, draws: int = 10) -> Table:
    """Lines of the table of boundaries, as if the model backtracked with these chances."""
    hits = rng.binomial(1, p[:, None], (len(p), draws))
    return [
        {"group": LABELLED, "problem_id": problem, "category": "c", "label": "backtracking", "third": THIRDS[0]}
        | {"draws": draws, "keyword_hits": int(of.sum()), "hits": int(of.sum()), "counted": draws, "complete": draws}
        | {"next_token": chance}
        for problem, of, chance in zip(problems, hits, p, strict=True)
    ]


def test_the_mean_share_is_unbiased_and_its_interval_covers() -> None:
    """Two boundaries a problem, alike in their chance, which differs between problems: 300 runs of known truth."""
    rng = np.random.default_rng(0)
    found, covered, stable_covered = [], 0, 0
    truly_stable = np.mean(1 - stats.binom.cdf(7, 10, rng.beta(0.6, 1.4, 400_000)))  # of chances drawn anew each time
    for _ in range(300):
        p = np.repeat(rng.beta(0.6, 1.4, 60), 2)
        line = stability.shares(lines_of(p, [str(i // 2) for i in range(120)], rng))[0]
        found.append(line["p"])
        covered += line["p_low"] <= 0.3 <= line["p_high"]
        stable_covered += line["stable_low"] <= truly_stable <= line["stable_high"]
        assert (line["boundaries"], line["problems"]) == (120, 60)
    assert np.mean(found) == pytest.approx(0.3, abs=4 * np.std(found) / 300**0.5)
    assert 0.92 <= covered / 300 <= 0.99 and 0.92 <= stable_covered / 300 <= 1


def test_what_is_sorted_by_one_half_is_scored_without_bias_by_the_other_and_not_by_itself() -> None:
    rng = np.random.default_rng(1)
    naive, honest, truth = [], [], []
    for _ in range(200):
        p = rng.beta(0.8, 1.6, 100)
        hits = rng.binomial(5, p[:, None], (100, 2))
        parts = boundaries.sorted_parts(hits[:, 0], np.full(100, 5), rng.random(100))
        assert np.bincount(parts).tolist() == [0, 20, 20, 20, 20, 20]
        top = parts == 5
        naive.append(hits[top, 0].mean() / 5)
        honest.append(hits[top, 1].mean() / 5)
        truth.append(p[top].mean())
    error = np.std(np.subtract(honest, truth)) / 200**0.5
    assert np.mean(honest) == pytest.approx(np.mean(truth), abs=4 * error) and error < 0.01
    assert np.mean(naive) > np.mean(truth) + 0.1


def test_parts_rise_with_the_share_then_with_what_breaks_ties() -> None:
    """A boundary that no draw was labelled of is among the lowest."""
    hits, draws = np.array([4, 2, 2, 0, 0, 0]), np.array([4, 4, 4, 4, 4, 0])
    parts = boundaries.sorted_parts(hits, draws, np.array([0, 0.1, 0.9, 0.2, 0.8, 0.1]), 3)
    assert parts.tolist() == [3, 2, 3, 1, 2, 1]


@pytest.mark.slow
def test_draws_are_those_of_the_model(made: tuple[Material, Path], tmp_path: Path) -> None:
    """Of single tokens: hits are binomial with the chance of a keyword, read in one forward pass."""
    e = experiment(draws=200)
    e.steering.batch_size = 100
    material = dataclasses.replace(made[0], experiment=e)
    found = boundaries.choose(material, "reasoning")
    drawn = boundaries.continuations(material, "reasoning", found, tmp_path / "draws.jsonl")
    odds = boundaries.next_token(material, "reasoning", found, tmp_path / "next.jsonl")
    keyword, _, _ = boundaries.hits(material, found, drawn)
    logits = last_logits(material, [place.prefix for place in found])
    logits[:, material.tokenizer.vocab_size :] = -np.inf
    words = [tiny.word_id(" wait"), tiny.word_id(" hmm")]
    p = special.softmax(logits, axis=-1)[:, words].sum(-1)
    np.testing.assert_allclose(special.expit(odds), p, rtol=1e-3)
    assert p.max() > 5 * p.min()
    z = (keyword.sum(1) - 200 * p) / np.sqrt(200 * p * (1 - p))
    assert stats.chi2.sf((z**2).sum(), len(z)) > 1e-3 and abs(z.sum()) < 3.5 * len(z) ** 0.5


@jax.jit
def _logits(model: Any, ids: jax.Array, positions: jax.Array, edit: Any) -> jax.Array:
    return model.logits(model(ids, positions, intervention=edit).resid)


def last_logits(material: Material, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """[n, V] float64 after the last token of each text, in one pass without a cache."""
    ids, positions = right_pad(texts, max(map(len, texts)))
    found = np.asarray(_logits(material.model("reasoning"), ids, positions, None), np.float64)
    return found[np.arange(len(texts)), [len(text) - 1 for text in texts]]


def test_prefixes_are_the_ids_that_were_sampled_and_not_those_of_their_text(made: tuple[Material, Path]) -> None:
    """A trace whose tokens are single bytes, which no encoder would choose."""
    material, _ = made
    trace, annotation = material.pairs[1]
    spelled = dataclasses.replace(trace, token_ids=tuple(trace.text.encode()))
    prompt = material.prompt_ids("reasoning", trace.problem)
    assert trace.text.isascii() and not trace.text.startswith("<think>")
    sums = material.sums["reasoning"]
    starts = sums.section_starts.copy()
    own = np.flatnonzero(sums.section_traces == sums.trace_ids.index(trace.id))[: len(annotation.sections)]
    starts[own] = [len(prompt) + section.start for section in annotation.sections]
    moved = dataclasses.replace(sums, section_starts=starts)
    read = dataclasses.replace(material, sums={"reasoning": moved})
    places = list(boundaries._of_trace(read, "reasoning", spelled, annotation))
    assert len(places) == len(annotation.sections) > 2
    for place, section in zip(places, annotation.sections, strict=True):
        assert list(place.prefix) == [*prompt, *trace.text[: section.start].encode()]
        assert place.label == section.label and place.reply_start == len(prompt)
        assert (
            len(place.prefix) > len(prompt + material.tokenizer.encode(trace.text[: section.start]))
            or not section.start
        )
    with pytest.raises(ValueError, match=rf"section 1 of trace '{trace.id}' is .* in the sums"):
        list(boundaries._of_trace(material, "reasoning", spelled, annotation))


def test_boundaries_are_spread_over_problems(made: tuple[Material, Path]) -> None:
    """None has a second before all have one; as many others; each with its own section of the sums."""
    material, _ = made
    sums = material.sums["reasoning"]
    all_of = boundaries.choose(material, "reasoning")
    per_problem = {p: sum(b.trace.problem_id == p for b in all_of[: len(all_of) // 2]) for p in tiny.TASKS}
    with_any = sum(n > 0 for n in per_problem.values())
    assert max(per_problem.values()) == 2 and len(all_of) % 2 == 0
    for limit in (3, with_any, with_any + 2):
        e = experiment(boundaries=limit)
        found = boundaries.choose(dataclasses.replace(material, experiment=e), "reasoning")
        own = [place for place in found if place.label == "backtracking"]
        times = [sum(b.trace.problem_id == p for b in own) for p in per_problem]
        assert len(own) == limit == len(found) - limit and sorted(times)[-1] - (limit > with_any) == 1
    for place in all_of:
        assert sums.plan.labels[sums.section_labels[place.row]] == place.label and sums.section_positions[place.row]
        assert sums.trace_ids[sums.section_traces[place.row]] == place.trace.id
        assert sums.section_starts[place.row] == len(place.prefix)
    assert len({place.row for place in all_of}) == len(all_of)


def test_where_no_window_was_read_nothing_is_asked(made: tuple[Material, Path]) -> None:
    e = experiment()
    e.vectors.label = "example-testing"
    with pytest.raises(ValueError, match=r"no window of a section of vectors.label='example-testing' was read"):
        boundaries.choose(dataclasses.replace(made[0], experiment=e), "reasoning")


REPLIES = [" wait, no. The first.", " so the first is.\nwait.", ".", "", " hmm", " the</think> wait."]


def placed(material: Material) -> tuple[list[Boundary], list[dict[str, Any]]]:
    trace = Trace("a/0", "a", "verbal", "Add.", "two is two. wait")
    prefix = [*material.prompt_ids("reasoning", "Add."), *material.tokenizer.encode("two is two.")]
    place = Boundary(trace, "backtracking", prefix, len(prefix) - len(material.tokenizer.encode("two is two.")), 0.5, 0)
    stop = material.tokenizer.stop_ids[0]
    drawn = [{"ids": [*material.tokenizer.encode(text), stop], "finish_reason": "stop"} for text in REPLIES]
    drawn[4] = {"ids": drawn[4]["ids"][:-1], "finish_reason": "length"}
    return [place], drawn


def test_the_first_sentence_counts(made: tuple[Material, Path]) -> None:
    found, drawn = placed(made[0])
    keyword, judged, complete = boundaries.hits(made[0], found, drawn)
    assert keyword.tolist() == [[1, 0, 0, 0, 1, 0]] and np.isnan(judged).all()
    assert complete.tolist() == [[1, 1, 1, 1, 0, 1]]


def test_the_judge_reads_each_text_once_with_what_stands_before_it(made: tuple[Material, Path]) -> None:
    asked: list[Trace] = []

    def judge(traces: Sequence[Trace]) -> list[Annotation]:
        asked.extend(traces)
        found = []
        for trace in traces:
            start = len("two is two.") + 1
            label = "backtracking" if "first" in trace.text else "deduction"
            sections = (Section("deduction", 0, start - 1), Section(label, start, len(trace.text)))
            failed = (Rejection("judge_failed:refused", "", ""),)
            found.append(Annotation(trace.id, "j", () if "hmm" in trace.text else sections, failed))
        return found

    found, drawn = placed(made[0])
    material = dataclasses.replace(made[0], judge=judge)
    second = dataclasses.replace(found[0], trace=dataclasses.replace(found[0].trace, id="b/0"))
    _, judged, _ = boundaries.hits(material, [*found, second], [*drawn, *drawn[:1], *drawn[:1], *drawn[1:5], drawn[0]])
    assert [trace.text for trace in asked] == [
        *("two is two. wait, no.", "two is two. so the first is.", "two is two. hmm", "two is two. the"),
        *("two is two. wait, no.", "two is two. so the first is.", "two is two. hmm"),
    ]
    assert len({trace.id for trace in asked}) == len(asked) and all(trace.token_ids is None for trace in asked)
    expected = [[0, 1, 0, 0, np.nan, 0], [0, 0, 1, 0, 0, np.nan]]
    np.testing.assert_array_equal(judged, expected)
    with_judge = boundaries.sort(material, "reasoning", found, drawn, [0.0])[0]
    assert [with_judge[n] for n in ("keyword_hits", "judge_hits", "judged", "hits", "counted")] == [2, 1, 5, 1, 5]
    assert [with_judge[n] for n in ("sort_hits", "sort_draws", "score_hits", "score_draws")] == [1, 3, 0, 2]


def test_boundaries_are_sorted_by_one_half_of_the_draws(made: tuple[Material, Path], tmp_path: Path) -> None:
    """Every column of the table of boundaries, from the draws by other code."""
    material, _ = made
    lines, by_question = table(made, "reasoning.stability"), []
    assert table(made, "base.stability") == table(made, "base.stability_effects") == []
    found = boundaries.choose(material, "reasoning")
    drawn = boundaries.continuations(material, "reasoning", found, tmp_path / "draws.jsonl")
    odds = boundaries.next_token(material, "reasoning", found, tmp_path / "next.jsonl")
    assert len(lines) == len(found) == len(drawn) / DRAWS and len(lines) > 20
    for place, line, chance in zip(found, lines, special.expit(odds), strict=True):
        assert (line["trace_id"], line["label"], line["category"]) == (
            place.trace.id,
            place.label,
            place.trace.category,
        )
        assert line["group"] == (LABELLED if place.label == "backtracking" else REFERENCE)
        assert line["token"] == len(place.prefix) - place.reply_start and line["section"] == place.row
        assert line["third"] == THIRDS[min(2, int(line["position"] * 3))] and 0 <= line["position"] < 1
        assert line["next_token"] == pytest.approx(chance) and line["draws"] == line["counted"] == DRAWS
    hit = np.zeros((len(found), DRAWS))
    for n, reply in enumerate(drawn):
        text = material.tokenizer.decode([i for i in reply["ids"] if i not in material.tokenizer.stop_ids])
        sentences = re.split(r"(?<=[.])\s+", text.split("</think>")[0].strip(" "))
        first = next((s for s in sentences if re.search(r"\w", s)), "")
        hit[n // DRAWS, n % DRAWS] = not {"wait", "hmm"}.isdisjoint(re.findall(r"[^\W_]+", first.lower()))
    assert 5 < hit.sum() < hit.size - 5
    np.testing.assert_array_equal([line["hits"] for line in lines], hit.sum(1))
    np.testing.assert_array_equal([line["sort_hits"] for line in lines], hit[:, : DRAWS // 2].sum(1))
    np.testing.assert_array_equal([line["score_hits"] for line in lines], hit[:, DRAWS // 2 :].sum(1))
    own = [line for line in lines if line["group"] == LABELLED]
    order = sorted(range(len(own)), key=lambda i: (own[i]["sort_hits"], own[i]["next_token"]))
    assert [own[i]["fifth"] for i in order] == [1 + rank * 5 // len(own) for rank in range(len(own))]
    assert {line["fifth"] for line in lines if line["group"] == REFERENCE} == {0}
    for group in (LABELLED, REFERENCE):
        members = [line for line in lines if line["group"] == group]
        k = np.array([line["hits"] for line in members])
        best = optimize.minimize(
            lambda x, k=k: -stats.betabinom.logpmf(k, DRAWS, *np.exp(x)).sum(),
            [0.0, 0.0],
            method="L-BFGS-B",
            bounds=[(-8, 8)] * 2,
        )
        a, b = np.exp(best.x)
        np.testing.assert_allclose([line["shrunk"] for line in members], (a + k) / (a + b + DRAWS), atol=0.01)
    by_question = boundaries.sort(
        dataclasses.replace(material, experiment=experiment(filter_by="question")), "reasoning", found, drawn, odds
    )
    for line, pooled in zip(lines, by_question, strict=True):
        same = [o for o in lines if (o["group"], o["problem_id"]) == (line["group"], line["problem_id"])]
        for name in ("sort_hits", "sort_draws", "score_hits"):
            assert pooled[name] == sum(o[name] for o in same)
        assert (
            pooled["shrunk"] == pytest.approx(np.mean([o["shrunk"] for o in same])) and pooled["hits"] == line["hits"]
        )
    assert any(len([o for o in own if o["problem_id"] == line["problem_id"]]) > 1 for line in own)


def vector_by_hand(material: Material, weights: np.ndarray, own: Table, problems: set[str]) -> np.ndarray:
    """Weighted mean of the boundaries' windows less the mean over traces of all sections', of these problems."""
    sums = material.sums["reasoning"]
    states = sums.section_means[:, sums.plan.layers.index(LAYER)].astype(np.float64)
    chosen = np.array([line["problem_id"] in problems for line in own])
    positive = np.average(states[[line["section"] for line in own]][chosen], axis=0, weights=weights[chosen])
    problem_of = {trace.id: trace.problem_id for trace in material.traces}
    shuffled = sums.plan.labels.index("shuffled")
    means = []
    for n, trace in enumerate(sums.trace_ids):
        rows = (sums.section_traces == n) & (sums.section_labels != shuffled) & (sums.section_positions > 0)
        if problem_of[trace] in problems and rows.any():
            means.append(states[rows].mean(0))
    return positive - np.mean(means, axis=0)


def test_effects_are_those_of_vectors_of_other_problems(made: tuple[Material, Path]) -> None:
    """Each change by another pass of the model, under a vector that is read here without the text's fold."""
    material, _ = made
    e = material.experiment
    lines, changes = table(made, "reasoning.stability"), table(made, "reasoning.stability_effects")
    own = [line for line in lines if line["group"] == LABELLED]
    weights = boundary_vectors.weightings(lines, RANDOM, e.seed)
    names = sorted({trace.problem_id for trace in material.traces})
    folds = dict(zip(names, np.random.default_rng(e.seed).permutation(len(names)) % FOLDS, strict=True))
    length = min(m for m in e.steering.magnitudes if m > 0)  # of the unit `absolute`
    texts = {problem for problem in (line["problem_id"] for line in changes)}
    assert len(texts) == TEXTS and {(line["vector"], line["draw"]) for line in changes} == {
        *(("all boundaries", 0), ("weighted by p", 0), *((f"fifth {n}", 0) for n in range(1, 6))),
        *((f"fifth {n}", r) for n in (1, 5) for r in range(1, RANDOM + 1)),
    }
    by_problem = {trace.problem_id: trace for trace in reversed(material.traces)}
    words = [tiny.word_id(" wait"), tiny.word_id(" hmm")]
    for line in changes[::7]:
        trace = by_problem[line["problem_id"]]
        ids, _, starts = given_text(material, "reasoning", trace, sentence_spans(trace)[1:])
        others = {problem for problem in names if folds[problem] != folds[line["problem_id"]]}
        vector = vector_by_hand(material, weights[line["vector"], line["draw"]], own, others)
        unit = jnp.asarray(vector / np.linalg.norm(vector), jnp.float32)
        tokens, positions = right_pad([ids], len(ids))
        found = []
        for norm in (0.0, length):
            edit = jax.tree.map(lambda x: x[None], add_vector(unit, LAYER, norm, n_layers=3))
            logits = np.asarray(_logits(material.model("reasoning"), tokens, positions, edit), np.float64)[0]
            p = special.softmax(logits, axis=-1)[np.array(starts) - 1][:, words].sum(-1)
            found.append(np.mean(np.log(p / (1 - p))))
        assert line["change"] == pytest.approx(found[1] - found[0], rel=1e-2, abs=2e-3), line


def test_random_orders_keep_weights_and_thirds() -> None:
    rng = np.random.default_rng(0)
    lines = [
        {"group": LABELLED, "third": THIRDS[rng.integers(3)], "shrunk": float(rng.random()), "fifth": n % 5 + 1}
        for n in range(40)
    ]
    found = boundary_vectors.weightings([*lines, lines[0] | {"group": REFERENCE}], 5, 0)
    assert len(found) == 7 + 3 * 5 and all(len(weights) == 40 for weights in found.values())
    thirds = np.array([line["third"] for line in lines])
    for (name, draw), weights in found.items():
        for third in THIRDS:
            assert sorted(weights[thirds == third]) == sorted(found[name, 0][thirds == third])
        assert not draw or (weights != found[name, 0]).any()
    assert not np.array_equal(found["fifth 5", 1], found["fifth 5", 2])
    assert not (found["fifth 5", 1] * found["fifth 1", 1]).any()  # no boundary is in both


def test_the_table_of_vectors(made: tuple[Material, Path]) -> None:
    material, _ = made
    lines, changes = table(made, "reasoning.stability"), table(made, "reasoning.stability_effects")
    found = {line["vector"]: line for line in table(made, "stability_vectors")}
    own = [line for line in lines if line["group"] == LABELLED]
    weights = boundary_vectors.weightings(lines, RANDOM, material.experiment.seed)
    everything = {trace.problem_id for trace in material.traces}
    run = material.vectors["reasoning", "backtracking"].at(LAYER).astype(np.float64)

    def changes_of(name: str, draw: int) -> dict[str, float]:
        return {o["problem_id"]: o["change"] for o in changes if (o["vector"], o["draw"]) == (name, draw)}

    def cosine(name: str, draw: int) -> float:
        v = vector_by_hand(material, weights[name, draw], own, everything)
        return float(v @ run / np.linalg.norm(v) / np.linalg.norm(run))

    for name, draw in weights:
        if draw:
            continue
        line, w = found[name], weights[name, 0]
        assert line["cosine"] == pytest.approx(cosine(name, 0), abs=1e-4)
        assert line["norm"] == pytest.approx(np.linalg.norm(vector_by_hand(material, w, own, everything)), rel=1e-4)
        assert line["effective"] == pytest.approx(w.sum() ** 2 / (w**2).sum()) and line["draws"] == 0
        score = np.array([o["score_hits"] / o["score_draws"] for o in own])
        assert line["p"] == pytest.approx(np.average(w if name == "weighted by p" else score, weights=w))
        values = list(changes_of(name, 0).values())
        assert (line["effect"], line["problems"]) == (pytest.approx(np.mean(values)), len(values))
        ends = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert [line["effect_low"], line["effect_high"]] == pytest.approx(ends)
    high, low = changes_of("fifth 5", 0), changes_of("fifth 1", 0)
    apart = [high[problem] - low[problem] for problem in high if problem in low]
    nulls = []
    for r in range(1, RANDOM + 1):
        high, low = changes_of("fifth 5", r), changes_of("fifth 1", r)
        nulls.append(np.mean([high[problem] - low[problem] for problem in high if problem in low]))
    line, null = found["fifth 5 - fifth 1"], found["random: fifth 5 - fifth 1"]
    assert line["effect"] == pytest.approx(np.mean(apart)) and line["problems"] == len(apart)
    assert line["p_value"] == pytest.approx((1 + np.sum(np.array(nulls) >= np.mean(apart))) / (RANDOM + 1))
    assert null["effect"] == pytest.approx(np.mean(nulls)) and null["draws"] == RANDOM
    assert [null["effect_low"], null["effect_high"]] == pytest.approx(np.quantile(nulls, [0.025, 0.975]))
    drawn = [cosine("weighted by p", r) for r in range(1, RANDOM + 1)]
    assert found["random: weighted by p"]["cosine"] == pytest.approx(np.mean(drawn), abs=1e-4)


def test_shares_and_counts(made: tuple[Material, Path]) -> None:
    lines = table(made, "reasoning.stability")
    for line in table(made, "stability_shares"):
        own = [
            o
            for o in lines
            if o["group"] == line["group"] and line["by"] in ("all", *o) and line["value"] in ("", o.get(line["by"]))
        ]
        assert line["boundaries"] == len(own) > 0
        assert line["p"] == pytest.approx(sum(o["hits"] for o in own) / sum(o["counted"] for o in own))
        assert line["stable"] == pytest.approx(np.mean([o["hits"] >= 0.8 * DRAWS for o in own]))
        assert line["next_token"] == pytest.approx(np.mean([o["next_token"] for o in own]))
        assert (
            line["p_low"] <= line["p"] <= line["p_high"] and line["stable_low"] <= line["stable"] <= line["stable_high"]
        )
    of_group = {
        group: [o for o in table(made, "stability_counts") if o["group"] == group] for group in (LABELLED, REFERENCE)
    }
    for group, counted in of_group.items():
        hits = [o["hits"] for o in lines if o["group"] == group]
        assert [line["hits"] for line in counted] == list(range(DRAWS + 1))
        assert [line["observed"] for line in counted] == [hits.count(k) for k in range(DRAWS + 1)]
        expected = len(hits) * stats.betabinom.pmf(range(DRAWS + 1), DRAWS, counted[0]["alpha"], counted[0]["beta"])
        assert [line["expected"] for line in counted] == pytest.approx(expected)
        assert counted[0]["truly_stable"] == pytest.approx(stats.beta.sf(0.8, counted[0]["alpha"], counted[0]["beta"]))
        assert 0 < counted[0]["fit_p"] <= 1


def test_a_figure_a_sentence_and_a_claim(made: tuple[Material, Path]) -> None:
    r = results(made)
    (plot,) = stability.STABILITY.plots(r)
    assert plot is not None and static.draw(plot).axes and interactive.figure(plot)
    assert [len(row) for row in plot.panels] == [2, 2] and plot.place > 7
    vectors = {line["vector"]: line for line in r.tables["stability_vectors"]}
    fifths = plot.panels[1][0].series[0]
    assert list(fifths.y) == [vectors[f"fifth {n}"]["effect"] for n in range(1, 6)]
    assert list(fifths.x) == [vectors[f"fifth {n}"]["p"] for n in range(1, 6)]
    (sentence,) = stability.STABILITY.sentences(r)
    line = vectors["fifth 5 - fifth 1"]
    assert f"by {line['effect']:.2f} nats more than that of the lowest fifth" in sentence and sentence.count(". ") == 0
    assert f"({line['effect_low']:.2f} to {line['effect_high']:.2f}, {line['problems']} problems" in sentence
    (claim,) = stability.STABILITY.claims(r)
    assert (claim.where, claim.verdict, claim.n) == (
        "-",
        "undecided",
        line["problems"],
    ) and "80 are needed" in claim.note
    assert claim.estimate == line["effect"] and line["effect_low"] < claim.low < claim.high < line["effect_high"]


@pytest.mark.parametrize(
    ("effect", "null", "expected"),
    [(0.5, 0.05, "holds"), (0.5, 0.5, "undecided"), (-0.5, 1.0, "fails"), (0.0, 0.05, "undecided")],
)
def test_the_claim_needs_its_interval_and_the_random_fifths(
    made: tuple[Material, Path], effect: float, null: float, expected: str
) -> None:
    r = results(made)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(90)
    noise -= noise.mean()
    changes = [
        {
            "role": "reasoning",
            "vector": f"fifth {n}",
            "draw": 0,
            "problem_id": str(i),
            "change": effect * (n == 5) + 0.3 * noise[i] * (n == 1),
        }
        for n in (1, 5)
        for i in range(90)
    ]
    vectors = [
        line | ({"effect": effect, "p_value": null, "problems": 90} if line["vector"] == "fifth 5 - fifth 1" else {})
        for line in r.tables["stability_vectors"]
    ]
    changed = dataclasses.replace(r, tables=r.tables | {"stability_effects": changes, "stability_vectors": vectors})
    assert [claim.verdict for claim in stability.STABILITY.claims(changed)] == [expected]


def test_a_killed_run_samples_nothing_twice(
    made: tuple[Material, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material, folder = made
    expected = tables.read(folder / "reasoning.stability.csv"), tables.read(folder / "reasoning.stability_effects.csv")
    call = generate.generate_rows
    sampled: list[int] = []

    def killed(*args: Any, **given: Any) -> Iterator[Any]:
        for number, batch in enumerate(call(*args, **given)):
            if number == 1:
                raise KeyboardInterrupt
            sampled.extend(row for row, _ in batch)
            yield batch

    monkeypatch.setattr(generate, "generate_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        stability.STABILITY.of_role(material, "reasoning", tmp_path)
    monkeypatch.setattr(
        generate, "generate_rows", lambda *a, **g: (sampled.extend(r for r, _ in b) or b for b in call(*a, **g))
    )
    found = stability.STABILITY.of_role(material, "reasoning", tmp_path)
    assert (found["stability"], found["stability_effects"]) == expected
    assert sorted(sampled) == list(range(DRAWS * len(expected[0])))
    again = dataclasses.replace(material, model=lambda role: pytest.fail("a model is loaded"))
    assert stability.STABILITY.of_role(again, "reasoning", tmp_path)["stability"] == expected[0]
    assert {path.name for path in tmp_path.iterdir()} == set(stability.STABILITY.scratch("reasoning"))


def test_the_plan_counts_draws(made: tuple[Material, Path]) -> None:
    run = pipeline.Run(experiment(draws=6, boundaries=7, tokens=9), ())
    text = plan.describe(run)
    assert "84 continuations of up to 9 tokens at most, with one prefill for 6 of them" in text
    assert "cache of continuations" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter_by": "trace"}, "questions.stability.filter_by='trace', expected one of boundary, question"),
        ({"draws": 5}, "questions.stability.draws=5, expected an even number, at least 2"),
        ({"draws": 0}, "questions.stability.draws=0, expected an even number, at least 2"),
        ({"tokens": 0}, "questions.stability.tokens=0, expected at least 1"),
        ({"boundaries": -1}, "questions.stability.boundaries=-1, expected at least 0"),
        ({"random": -1}, "questions.stability.random=-1, expected at least 0"),
        ({"magnitude": -2.0}, "questions.stability.magnitude=-2.0, expected a number above 0, or 0 for the smallest"),
        ({"magnitude": math.inf}, "questions.stability.magnitude=inf, expected a number above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        checks.check(experiment(**settings))


def test_what_the_question_needs_of_other_fields_is_checked_where_it_is_asked() -> None:
    for change, message in (
        (
            ("traces", "temperature", 0.0),
            "traces.temperature=0.0, expected above 0 where questions.ask has 'stability'",
        ),
        (("vectors", "layers", (2,)), "vectors.layers=(2,), expected steering.layer=1 among them"),
        (("steering", "magnitudes", (0.0, -4.0)), "questions.stability.magnitude=0.0, expected a number above 0"),
    ):
        e = experiment()
        spec, field, value = change
        setattr(getattr(e, spec), field, value)
        with pytest.raises(ValueError, match=re.escape(message)):
            checks.check(e)
        e.questions.ask = ()
        checks.check(e)
    assert (
        boundary_vectors.magnitude(experiment()) == 8.0 and boundary_vectors.magnitude(experiment(magnitude=3.0)) == 3.0
    )


def test_lengths_are_those_of_the_unit(made: tuple[Material, Path]) -> None:
    material, _ = made
    for unit, scale in (
        ("absolute", 1.0),
        ("relative", material.sums["reasoning"].mean_norm[LAYER]),
        ("raw", np.linalg.norm(material.vectors["reasoning", "backtracking"].directions[LAYER])),
    ):
        e = experiment(magnitude=2.0)
        e.steering.unit = unit
        found = boundary_vectors.length(dataclasses.replace(material, experiment=e), "reasoning")
        assert found == pytest.approx(2 * scale)


@pytest.mark.slow
def test_a_run_that_asks_has_its_tables_figure_and_sentence(finished: Path) -> None:
    """And nothing half done is left; what was not asked for is not there."""
    assert not list(finished.rglob("*stability*"))
    pipeline.Run(experiment(tokens=4)).run()
    names = {path.name for path in (finished / "5-analysis").glob("*stability*")}
    assert names == {
        *(f"{role}.{name}.csv" for role in ("base", "reasoning") for name in stability.STABILITY.role_tables),
        *(f"{name}.csv" for name in stability.STABILITY.tables),
    }
    assert (finished / "6-report" / "stability.png").exists()
    for shown in ("summary.md", "report.html"):
        assert "boundaries before backtracking (" in (finished / "6-report" / shown).read_text()
