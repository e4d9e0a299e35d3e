"""Rows of an autoencoder beside the vector: against numpy and scikit-learn, and a feature that is known to be it."""

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file
from sklearn.metrics import roc_auc_score

from backtrack_jax import pipeline, sae_files
from backtrack_jax.analysis import logit_lens, sae
from backtrack_jax.analysis.results import Results
from backtrack_jax.checks import check
from backtrack_jax.compatibility import check_planned
from backtrack_jax.data.records import UNSTEERED, Annotation, Section
from backtrack_jax.data.text import KEYWORDS, sentence_spans
from backtrack_jax.intervention import add_vector, stack_rows
from backtrack_jax.models.batching import right_pad
from backtrack_jax.stages.analysis import ANALYSIS, gather
from backtrack_jax.stages.vectors import VECTORS

D, F = 16, 64


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and chains of the tiny experiment, nothing of it run."""
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, rows: np.ndarray, hook: str = "blocks.1.hook_resid_post") -> Path:
    """An autoencoder whose encoder is its decoder."""
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps({"architecture": "standard", "hook_name": hook}))
    weights = {"W_enc": rows.T.copy(), "W_dec": rows, "b_enc": np.zeros(len(rows), np.float32)}
    save_file(weights | {"b_dec": np.zeros(rows.shape[1], np.float32)}, folder / "sae_weights.safetensors")
    return folder


def test_chance_of_the_largest_cosine_is_that_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1500, 300, 12))
    largest = np.abs(rows[..., 0] / np.linalg.norm(rows, axis=-1)).max(1)  # with the first axis
    for quantile in (0.25, 0.5, 0.95):
        assert np.mean(largest < sae.chance_cosine(300, 12, quantile)) == pytest.approx(quantile, abs=0.04)
    for n in (32768, 131072):  # of SAEs of an 8B model; a row's cosine with an axis, out of its parts
        along, across = rng.standard_normal((60, n), np.float32) ** 2, rng.chisquare(4095, (60, n))
        largest = np.sqrt((along / (along + across)).max(1))
        assert np.median(largest) == pytest.approx(sae.chance_cosine(n, 4096), abs=0.0012)
        rule = math.sqrt(2 * math.log(2 * n) / 4096)  # .074 and .078
        assert sae.chance_cosine(n, 4096) < rule < sae.chance_cosine(n, 4096, 0.95)


def test_auc_of_columns_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    values, positive = rng.integers(0, 5, (60, 7)), rng.random(60) < 0.3
    expected = [roc_auc_score(positive, column) for column in values.T]
    np.testing.assert_allclose(sae.auc_of_columns(values, positive), expected)
    assert np.isnan(sae.auc_of_columns(values, np.zeros(60, bool))).all()


def test_the_feature_that_is_the_vector_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows differ along one direction, which is row 5: first by cosine and by AUC, on either half of problems."""
    monkeypatch.setattr(sae_files, "BLOCK", 10)
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((F, D)).astype(np.float32)
    positive = rng.random(300) < 0.4
    unit = rows[5] / np.linalg.norm(rows[5])
    tokens = (rng.standard_normal((300, 4, D)) + positive[:, None, None] * unit).astype(np.float32)
    problems = np.array([f"p{i // 3}" for i in range(300)])
    loaded = sae_files.load(write(tmp_path / "sae", rows))
    read_out = rng.standard_normal(D).astype(np.float32)
    windows = sae.Windows(tokens, positive, problems)
    ranked = sae.rank(loaded, unit, read_out, windows)
    assert np.argmax(ranked.cosine) == np.argmax(ranked.auc_chosen) == np.argmax(ranked.auc) == 5
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(ranked.cosine, units @ unit, atol=1e-5)
    np.testing.assert_allclose(ranked.keyword_logit, units @ read_out, rtol=1e-4, atol=1e-5)
    means = np.maximum(tokens @ rows.T, 0).mean(1)
    half = sae.probe.folds(problems.tolist(), 2) == 0
    for found, some in ((ranked.auc_chosen, half), (ranked.auc, ~half)):
        expected = [roc_auc_score(positive[some], means[some, i]) for i in range(F)]
        np.testing.assert_allclose(found, expected, atol=2e-3)  # rounding moves ties
    assert not set(problems[half]) & set(problems[~half])
    summary = sae._summary(loaded, unit, ranked, np.array([5, 3]), windows)
    flat = tokens.reshape(-1, D)
    rest = np.sum((flat - np.maximum(flat @ rows.T, 0) @ rows) ** 2)
    assert summary["explained_variance"] == pytest.approx(1 - rest / np.sum((flat - flat.mean(0)) ** 2), rel=1e-3)
    assert summary["active_features"] == pytest.approx(np.mean(np.sum(flat @ rows.T > 0, 1)), rel=1e-3)
    assert summary["in_span"] == pytest.approx(1, abs=1e-6)
    table = sae._rows_table(loaded, "base", ranked, windows, 2, 0)
    first = next(line for line in table if line["row"] == 5)
    assert (first["place_cosine"], first["place_auc"]) == (1, 1)
    assert first["auc_low"] < first["auc"] == pytest.approx(ranked.auc[5], abs=1e-6)


def test_controls_spell_as_loudly_and_are_no_nearer_than_chance() -> None:
    rng = np.random.default_rng(3)
    cosine, logit = rng.uniform(-1, 1, 400), rng.standard_normal(400)
    nan = np.full(400, np.nan)
    ranked = sae.Ranked(cosine, logit, nan, nan, nan)
    nearest = np.argsort(-cosine)[:6]
    sets = sae.matched(ranked, nearest, 4, 30)
    assert sets.shape == (4, 6) and len(set(sets.ravel())) == 24 and not set(sets.ravel()) & set(nearest)
    bound = sae.chance_cosine(1, 30, 0.95)
    assert np.abs(cosine[sets]).max() < bound
    free = (np.abs(cosine) < bound) & ~np.isin(np.arange(400), nearest)
    closest = np.sort(np.abs(logit[free] - logit[nearest[0]]))[:4]  # the first row has the first choice
    np.testing.assert_allclose(np.sort(np.abs(logit[sets[:, 0]] - logit[nearest[0]])), closest)
    with pytest.raises(ValueError, match=r"questions\.sae\.top=6: only 0 of 400 rows"):
        sae.matched(dataclasses.replace(ranked, cosine=np.ones(400)), nearest, 4, 30)


def test_what_is_left_outside_of_rows() -> None:
    rng = np.random.default_rng(4)
    x, rows = rng.standard_normal(D), rng.standard_normal((3, D))
    basis = np.linalg.qr(rows.T)[0]
    np.testing.assert_allclose(sae.outside(x, rows), x - basis @ (basis.T @ x), atol=1e-6)


def test_a_run_that_asks(finished: Path) -> None:
    """Tables, sentence, claim and figures of a run; log-odds are those of the model with the sum added by hand."""
    rng = np.random.default_rng(5)
    v = VECTORS.load(finished / "3-vectors", "reasoning", "backtracking").at(1)
    rows = rng.standard_normal((F, D)).astype(np.float32)
    rows[5] = 2 * v / np.linalg.norm(v)
    write(Path("sae"), rows)
    e = tiny.get_config()
    e.questions.ask, e.questions.sae.path = ("sae",), "sae"
    e.questions.sae.top, e.questions.sae.controls, e.questions.sae.singles, e.questions.sae.listed = 3, 2, 1, 4
    check(e)
    made = pipeline.Run(e)
    material = gather(made.context)
    found = {role: sae.SAE_DIRECTIONS.of_role(material, role, finished) for role in e.roles}
    tables = {name: [x for role in e.roles for x in found[role][name]] for name in sae.SAE_DIRECTIONS.role_tables}
    own = found["reasoning"]["sae_effects"]
    counts = {name: sum(line["condition"] == name for line in own) for name in (UNSTEERED, *sae._ORDER)}
    assert counts == {
        UNSTEERED: 3,
        sae.VECTOR: 3,
        sae.TOP: 3,
        sae.CONTROL: 6,
        sae.SINGLE: 3,
        sae.WITHOUT: 3,
        sae.ABLATED: 3,
    }
    first = next(line for line in found["reasoning"]["sae_rows"] if line["row"] == 5)
    assert first["place_cosine"] == 1 and first["cosine"] == pytest.approx(1, abs=1e-5)

    # The vector is row 5, so that adding either is the same.
    values = {(x["condition"], x["number"], x["problem_id"]): x["log_odds"] for x in own}
    for _, _, problem in values:
        assert values[sae.SINGLE, 5, problem] == pytest.approx(values[sae.VECTOR, 0, problem], rel=1e-4)

    # The sum, by hand.
    model = material.model("reasoning")
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    nearest = np.argsort(-(units @ (v / np.linalg.norm(v))))[:3]
    summed = units[nearest].sum(0) / np.linalg.norm(units[nearest].sum(0))
    line = next(x for x in own if x["condition"] == sae.TOP)
    trace = next(t for t in material.traces if t.problem_id == line["problem_id"])
    spans = sentence_spans(trace)[1:]
    annotation = Annotation(trace.id, "", tuple(Section("", *span) for span in spans))
    read = material.token_trace("reasoning", trace, annotation)
    starts = sorted({at for _, at in read.starts})[: e.analysis.forced_sentences]
    row = add_vector(jnp.asarray(summed), 1, 8.0, n_layers=3)
    ids, positions = map(jnp.asarray, right_pad([read.ids], len(read.ids)))
    resid = model(ids, positions, intervention=stack_rows([row])).resid
    p = np.asarray(jnp.exp(jnp.asarray(model.logits(resid))[0].astype(jnp.float32)), np.float64)
    p /= p.sum(-1, keepdims=True)
    words = sorted(logit_lens.word_ids(material.tokenizer, KEYWORDS))
    yes = p[:, words].sum(-1)[np.array(starts) - 1]
    assert line["log_odds"] == pytest.approx(np.mean(np.log(yes / (1 - yes))), rel=1e-3, abs=1e-3)
    assert line["length"] == 8.0

    # What rows spell, through the final norm's weight.
    ids = logit_lens.keyword_ids(material.tokenizer, e.analysis.keywords)
    n = material.tokenizer.vocab_size
    logits = np.asarray(model.unembed(jnp.asarray(summed) * model.norm.weight[...]))[:n]
    others = np.setdiff1d(np.arange(n), ids)
    assert line["keyword_logit"] == pytest.approx(logits[ids].mean() - logits[others].mean(), abs=1e-4)

    r = Results(made.experiment, VECTORS.read_summary(made.context.folder(VECTORS)), tables, {}, [], "", {})
    effects = sae.effects_of(r, "reasoning")
    plain = {x["problem_id"]: x["log_odds"] for x in own if x["condition"] == UNSTEERED}
    expected = []
    for problem, before in plain.items():
        control = np.mean([values[sae.CONTROL, number, problem] for number in (0, 1)])
        expected.append([values[sae.TOP, 0, problem] - before, control - before])
    np.testing.assert_allclose(sae.paired(effects, sae.TOP, sae.CONTROL), expected)
    claim = sae.SAE_DIRECTIONS.claims(r)[0]
    assert claim.estimate == pytest.approx(np.mean(np.subtract(*np.transpose(expected))))
    assert claim.n == 3 and claim.verdict == "undecided"
    assert "3 problems" in sae.SAE_DIRECTIONS.sentences(r)[0]
    assert [plot.name for plot in sae.SAE_DIRECTIONS.plots(r) if plot] == ["sae_effects", "sae_rows"]

    before = ANALYSIS.inputs(e)
    write(Path("sae"), 2 * rows)  # the content counts, not the path
    assert ANALYSIS.inputs(e) != before


def test_an_autoencoder_of_another_model_is_refused_before_anything_runs(written: Path) -> None:
    e = tiny.get_config()
    e.questions.ask = ("sae",)
    with pytest.raises(ValueError, match=r"questions\.sae\.path=''"):
        check(e)
    e.questions.sae.path = "sae"
    e.questions.sae.singles = 9
    with pytest.raises(ValueError, match=r"questions\.sae\.singles=9.*questions\.sae\.top=8"):
        check(e)
    e.questions.sae.singles = 3
    check(e)
    rows = np.eye(20, dtype=np.float32)
    for part, hook, says in (
        (rows, "blocks.1.hook_resid_post", "base model: sae: reads activations of width 20, the model has 16"),
        (rows[:, :16], "blocks.7.hook_resid_post", "reads block 7, the model has blocks 0..2"),
    ):
        write(written / "sae", part, hook)
        with pytest.raises(ValueError, match=r"questions\.sae\.path, .*") as error:
            check_planned(e)
        assert says in str(error.value)
