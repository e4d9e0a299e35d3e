"""Every column of every table of stage 5 of the lopsided run, computed once more from what it is of, by other code."""

import csv
import functools
import json
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lopsided
import numpy as np
import pytest
from runs import ROLES, lines_of
from safetensors.numpy import load_file
from scipy import special
from sklearn import metrics

from backtrack_jax import generate, pipeline
from backtrack_jax.analysis import activations, by_problem, forced, log_odds, probe, reliability, shuffles
from backtrack_jax.analysis.base import Material
from backtrack_jax.analysis.statistics import mean_interval, paired_interval, rate_interval
from backtrack_jax.data import records
from backtrack_jax.data.text import split_sentences
from backtrack_jax.files import tables
from backtrack_jax.intervention import Intervention, add_vector, gaussian_noise, no_intervention, stack_rows
from backtrack_jax.models import checkpoint
from backtrack_jax.stages import analysis as stage_analysis
from backtrack_jax.stages.vectors import _drawn_sections

E = lopsided.get_config()
LABELS = ("initializing", "deduction", "adding-knowledge", "uncertainty-estimation", "backtracking")
KEPT = E.vectors.layers
LAST = 2  # layer that is steered, and the last one
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(lopsided_run: Path) -> Path:
    return lopsided_run / "results" / "lopsided"


@pytest.fixture(scope="module")
def material(lopsided_run: Path) -> Material:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(lopsided_run)
        made = stage_analysis.gather(pipeline.Run(lopsided.get_config()).context)
        for problem in {trace.problem for trace in made.traces}:  # tokenizer and files are looked up here
            made.prompt_ids("base", problem)
        return made


@pytest.fixture(scope="module")
def model(lopsided_run: Path) -> Callable[[str], Any]:
    return functools.cache(lambda role: checkpoint.load(str(lopsided_run / role), dtype="float32"))


def table(results: Path, name: str) -> Lines:
    found = tables.read(results / "5-analysis" / f"{name}.csv")
    with (results / "5-analysis" / f"{name}.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(found) > 1
    return found


def same(found: Lines, expected: Lines, *, rel: float = 1e-6) -> None:
    """The same columns in the same order, and the same values; NaN equals NaN."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        for name, value in other.items():
            where = f"{name} of { {k: v for k, v in one.items() if isinstance(v, str | int)} }"
            if isinstance(value, float):
                assert one[name] == pytest.approx(value, rel=rel, abs=1e-9, nan_ok=True), where
            else:
                assert one[name] == value, where


@functools.cache
def _forward(n: int, length: int) -> Any:
    return jax.jit(lambda model, ids, positions, edit: model.logits(model(ids, positions, intervention=edit).resid))


def log_probabilities(model: Any, texts: Sequence[Sequence[int]], edits: Sequence[Intervention]) -> list[np.ndarray]:
    """[tokens, V] of each text, all in one batch of their own shape."""
    length = max(map(len, texts))
    ids, positions = np.zeros((len(texts), length), np.int32), np.full((len(texts), length), -1, np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)], positions[row, : len(text)] = text, np.arange(len(text))
    logits = np.asarray(_forward(len(texts), length)(model, ids, positions, stack_rows(edits)), np.float64)
    return [special.log_softmax(of[: len(text)], axis=-1) for of, text in zip(logits, texts, strict=True)]


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", re.sub(r"</?think>|<｜.*?｜>", " ", text).lower())


def repeated(words: list[str], n: int) -> float:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def test_replies(results: Path, material: Material, model: Callable[[str], Any]) -> None:
    replies = lines_of(results / "4-steering" / "generations.jsonl")
    likelihood: dict[int, float] = {}
    for role in ROLES:
        own = [n for n, reply in enumerate(replies) if reply["target"] == role]
        prompts = [material.prompt_ids(role, replies[n]["problem"]) for n in own]
        texts = [[*prompt, *replies[n]["ids"]] for n, prompt in zip(own, prompts, strict=True)]
        found = log_probabilities(model(role), texts, [no_intervention(3, 16)] * len(own))
        for n, prompt, log_p in zip(own, prompts, found, strict=True):
            ids = replies[n]["ids"]
            likelihood[n] = float(np.mean([log_p[len(prompt) + i - 1, token] for i, token in enumerate(ids)]))
    expected = []
    for n, reply in enumerate(replies):
        text, words = reply["text"], words_of(reply["text"])
        both = (material.tokenizer.decode(material.prompt_ids(reply["target"], reply["problem"])) + text).lower()
        keyword = [material.tokenizer.decode([i]).strip().lower() in ("wait", "hmm") for i in reply["ids"]]
        sentences = [words_of(text[slice(*span)]) for span in split_sentences(text)]
        names = ("target", "kind", "source", "layer", "window", "magnitude", "length", "unit", "span")
        expected.append(
            {name: reply[name] for name in (*names, "problem_id", "category", "sample")}
            | {"hits": words.count("wait") + words.count("hmm"), "words": len(words)}
            | {"substring_hits": both.count("wait") + both.count("hmm"), "substring_words": len(both.split())}
            | {"token_rate": sum(keyword) / len(keyword), "sentences": len(sentences)}
            | {"keyword_sentences": sum(not {"wait", "hmm"}.isdisjoint(sentence) for sentence in sentences)}
            | {"judged_sentences": 0, "judged_backtracking": 0, "tokens": len(reply["ids"])}
            | {"finish_reason": reply["finish_reason"], "log_likelihood": likelihood[n]}
            | {"repeated_2grams": repeated(words, 2), "repeated_3grams": repeated(words, 3)}
            | {"compression": len(zlib.compress(text.encode(), 9)) / len(text.encode()) if text else 1.0}
        )
    same(table(results, "replies"), expected, rel=1e-4)


CONDITION = ("target", "kind", "source", "layer", "window", "magnitude", "length", "unit", "span")


def by_condition(lines: Lines) -> dict[tuple[Any, ...], Lines]:
    cells: dict[tuple[Any, ...], Lines] = defaultdict(list)
    for line in lines:
        cells[tuple(line[name] for name in CONDITION)].append(line)
    return cells


def sums(lines: Lines, *names: str) -> dict[str, np.ndarray]:
    """Problem, in alphabetical order -> sums of these columns."""
    return {
        problem: np.array([sum(line[name] for line in lines if line["problem_id"] == problem) for name in names])
        for problem in sorted({line["problem_id"] for line in lines})
    }


def test_rates(results: Path) -> None:
    lines = table(results, "replies")
    for line in lines:
        line["keyword_tokens"] = round(line["tokens"] * line["token_rate"])
    cells = by_condition(lines)
    plain = {key[0]: sums(of, "hits", "words") for key, of in cells.items() if key[1] == "unsteered"}
    expected = []
    for key, of in cells.items():
        each = np.array([line["hits"] / line["words"] if line["words"] else 0.0 for line in of])
        made: dict[str, Any] = dict(zip(CONDITION, key, strict=True))
        ratios = {"": ("hits", "words"), "substring_rate": ("substring_hits", "substring_words")}
        ratios |= {"token_rate": ("keyword_tokens", "tokens"), "sentence_rate": ("keyword_sentences", "sentences")}
        for name, columns in (ratios | {"judge_rate": ("judged_backtracking", "judged_sentences")}).items():
            above, below = np.array(list(sums(of, *columns).values()), float).T
            empty = math.nan if name == "judge_rate" else 0.0
            low, high = rate_interval(above, below)
            value = float(above.sum() / below.sum()) if below.sum() else empty
            made |= {name or "rate": value} | {
                f"{name}_low" if name else "low": low,
                f"{name}_high" if name else "high": high,
            }
            if not name:
                made |= {
                    "mean_rate": float(each.mean()),
                    "std_rate": float(np.sqrt(((each - each.mean()) ** 2).mean())),
                }
        made |= {"n_replies": len(of), "n_problems": len({line["problem_id"] for line in of}), "n_judged": 0}
        made |= {"n_hits": sum(line["hits"] for line in of), "n_words": sum(line["words"] for line in of)}
        for name in ("log_likelihood", "repeated_2grams", "repeated_3grams", "compression"):
            count = Counter(line["problem_id"] for line in of)
            of_problem = sums(of, name)
            low, high = mean_interval([float(of_problem[p][0]) for p in of_problem], [count[p] for p in of_problem])
            made |= {name: sum(line[name] for line in of) / len(of), f"{name}_low": low, f"{name}_high": high}
        effect = (math.nan,) * 3
        if key[1] != "unsteered":
            own, other = sums(of, "hits", "words"), plain[key[0]]
            hits, words = np.array([[of_cell[p] for p in own] for of_cell in (own, other)]).transpose(2, 0, 1)
            rates = [h / w if w else 0.0 for h, w in zip(hits.sum(1), words.sum(1), strict=True)]
            effect = (float(rates[0] - rates[1]), *paired_interval(hits, words, [1, -1]))
        expected.append(made | dict(zip(("effect", "effect_low", "effect_high"), effect, strict=True)))
    same(table(results, "rates"), expected)
    assert len({line["n_problems"] for line in expected}) == 2 and len({line["rate"] for line in expected}) > 8


def test_effects(results: Path) -> None:
    cells = by_condition(table(results, "replies"))
    rate = {
        key: {p: h / w if w else 0.0 for p, (h, w) in sums(of, "hits", "words").items()} for key, of in cells.items()
    }
    plain = {key[0]: of for key, of in rate.items() if key[1] == "unsteered"}
    expected = [
        dict(zip(CONDITION, key, strict=True))
        | {"problem_id": problem, "rate": of[problem], "unsteered": plain[key[0]][problem]}
        | {"effect": of[problem] - plain[key[0]][problem]}
        for key, of in rate.items()
        if key[1] != "unsteered"
        for problem in dict.fromkeys(line["problem_id"] for line in cells[key])
    ]
    same(table(results, "effects"), expected)


def test_windows(results: Path, material: Material) -> None:
    drawn = _drawn_sections([annotation for _, annotation in material.pairs], "backtracking")
    windows = [(-5, -2), (-7, -6), (-1, 0)]
    count: Counter[tuple[str, str, tuple[int, int], bool]] = Counter()
    for role in ROLES:
        for (trace, annotation), shuffled in zip(material.pairs, drawn, strict=True):
            read = material.token_trace(role, trace, annotation)
            assert len(read.starts) == len(annotation.sections)
            for number, (label, start) in enumerate(read.starts):
                groups = [label, "all", *(["rest"] * (label != "backtracking")), *(["shuffled"] * (number in shuffled))]
                for window in windows:
                    inside = start + window[0] >= read.reply_start and start + window[1] < len(read.ids)
                    count.update((role, group, window, inside) for group in groups)
    expected = [
        {"role": role, "label": label, "window": f"{window[0]}..{window[1]}"}
        | {"read": count[role, label, window, True], "dropped": count[role, label, window, False]}
        for role in ROLES
        for label in (*sorted(LABELS), "shuffled", "all", "rest")
        for window in windows
    ]
    same(table(results, "windows"), expected)
    assert len({line["read"] for line in expected}) >= 12


def means_by_trace(material: Material, role: str, label: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """[n, D] mean of each trace's sections with a label, NaN without any, and how many positions they have."""
    s = material.sums[role]
    means, counts = np.full((len(material.pairs), 16), np.nan), np.zeros(len(material.pairs), int)
    for number, (trace, _) in enumerate(material.pairs):
        own = (s.section_traces == s.trace_ids.index(trace.id)) & (s.section_positions > 0)
        names = np.array([s.plan.labels[i] for i in s.section_labels])
        own &= ~np.isin(names, ("backtracking", "shuffled")) if label == "rest" else names != "shuffled"
        own &= names == label if label not in ("all", "rest") else True
        if own.any():
            means[number] = s.section_means[own, KEPT.index(layer)].astype(np.float64).mean(0)
            counts[number] = s.section_positions[own].sum()
    return means, counts


def of_label(material: Material, role: str, label: str, layer: int) -> by_problem.ProblemSums:
    other = "rest" if label == "backtracking" else "all"
    positive, n = means_by_trace(material, role, label, layer)
    contrast, m = means_by_trace(material, role, other, layer)
    return by_problem.of_traces(positive, contrast, (n, m), [trace.problem_id for trace, _ in material.pairs])


def directions(results: Path, role: str, label: str) -> np.ndarray:
    found = load_file(results / "3-vectors" / f"{role}.{label}.safetensors")
    return np.stack([found[f"direction.{layer}"] for layer in range(3)]).astype(np.float64)


def read_labels(results: Path) -> list[str]:
    return [label for label in sorted(LABELS) if (results / "3-vectors" / f"base.{label}.safetensors").exists()]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def test_similarity(results: Path, material: Material) -> None:
    expected = []
    for label in read_labels(results):
        vectors = {role: directions(results, role, label) for role in ROLES}
        ids = [trace.id for trace, _ in material.pairs]
        drawn = shuffles.shuffle(material.sums, ids, label, seed=E.seed)
        for layer in range(3):
            made: dict[str, Any] = {"label": label, "layer": layer}
            made["cosine"] = cosine(*(vectors[role][layer] for role in ROLES))
            null: dict[str, np.ndarray] = {}
            if layer in KEPT:
                read = {role: of_label(material, role, label, layer) for role in ROLES}
                n = min(of.n_problems for of in read.values())
                raw = by_problem.cosine(read["base"], read["reasoning"])
                corrected, error = by_problem.corrected_cosine(read["base"], read["reasoning"])
                low, high = by_problem.cosine_interval(float(raw[0]), by_problem.standard_error(raw), n)
                ends = by_problem.cosine_interval(corrected, error, n)
                made |= {"low": low, "high": high, "corrected": corrected}
                made |= {"corrected_low": ends[0], "corrected_high": ends[1], "corrected_error": error}
                for role in ROLES:
                    one_group = np.zeros(len(ids), int)
                    of_role = shuffles.shuffled_sums(drawn, material, role, ids, label, layer, one_group)
                    null[role] = of_role.vectors(np.array([True])).astype(np.float64)
                cosines = [cosine(*pair) for pair in zip(null["base"], null["reasoning"], strict=True)]
                made |= {"shuffled": float(np.mean(cosines)), "shuffled_low": float(np.quantile(cosines, 0.025))}
                made |= {"shuffled_high": float(np.quantile(cosines, 0.975))}
                made["shuffled_95"] = float(np.quantile(cosines, 0.95))
            else:
                names = ("low", "high", "corrected", "corrected_low", "corrected_high", "corrected_error", "shuffled")
                made |= dict.fromkeys((*names, "shuffled_low", "shuffled_high", "shuffled_95"), math.nan)
                n = 0
            for role in ROLES:
                lengths = np.linalg.norm(null[role], axis=1) if null else np.array([math.nan])
                made |= {f"norm_{role}": float(np.linalg.norm(vectors[role][layer]))}
                made |= {f"norm_{role}_shuffled": float(lengths.mean())}
                made |= {f"norm_{role}_95": float(np.quantile(lengths, 0.95))}
            expected.append(made | {"n_problems": n})
    same(table(results, "similarity"), expected, rel=1e-4)


def test_label_cosines(results: Path) -> None:
    labels = [label for label in LABELS if label in read_labels(results)]
    expected = [
        {"role": role, "layer": layer, "label": a, "other": b}
        | {"cosine": cosine(directions(results, role, a)[layer], directions(results, role, b)[layer])}
        for role in ROLES
        for layer in range(3)
        for a in labels
        for b in labels
    ]
    same(table(results, "label_cosines"), expected, rel=1e-5)


def test_reliability(results: Path, material: Material) -> None:
    problems = [trace.problem_id for trace, _ in material.pairs]
    found = table(results, "reliability")
    assert [(line["role"], line["layer"], line["label"]) for line in found] == [
        (role, layer, label) for role in ROLES for layer in KEPT for label in (*sorted(LABELS), "shuffled")
    ]
    for line in (line for line in found if line["label"] != "shuffled"):
        positive, n = means_by_trace(material, line["role"], line["label"], line["layer"])
        other = "rest" if line["label"] == "backtracking" else "all"
        contrast, m = means_by_trace(material, line["role"], other, line["layer"])
        half = reliability.split_half(positive, contrast, problems, weights=(n, m), seed=E.seed)
        full = 2 * half.cosine / (1 + half.cosine)
        expected = {"cosine": half.cosine, "low": half.low, "high": half.high, "full": full, "n_splits": half.n_splits}
        same([{name: line[name] for name in expected}], [expected], rel=1e-4)


def test_agreement(results: Path, material: Material) -> None:
    judged, keyword, left_out = [], [], 0
    for trace, annotation in material.pairs:  # of one without labels, all sentences are left out
        end = trace.text.find("</think>")
        for start, stop in split_sentences(trace.text[: end if end >= 0 else None]):
            labels = {s.label for s in annotation.sections if s.start < stop and start < s.stop}
            left_out += not labels
            if labels:
                judged.append("backtracking" in labels)
                keyword.append(not {"wait", "hmm"}.isdisjoint(words_of(trace.text[start:stop])))
    (line,) = tables.read(results / "5-analysis" / "agreement.csv")
    assert (line["group"], line["unit"], line["n_units"], line["n_reference"]) == (
        "all",
        "sentence",
        len(judged),
        sum(judged),
    )
    assert (line["n_problems"], line["n_traces"], line["left_out_traces"]) == (12, len(material.pairs), 0)
    assert line["left_out_units"] == left_out > 1
    assert line["precision"] == pytest.approx(metrics.precision_score(judged, keyword))
    assert line["recall"] == pytest.approx(metrics.recall_score(judged, keyword)) != pytest.approx(line["precision"])
    assert line["f1"] == pytest.approx(metrics.f1_score(judged, keyword))
    assert line["kappa"] == pytest.approx(metrics.cohen_kappa_score(judged, keyword))
    for name in ("precision", "recall", "f1", "kappa"):
        assert line[f"{name}_low"] < line[f"{name}_high"] and line[f"{name}_low"] <= line[name] <= line[f"{name}_high"]


@pytest.mark.parametrize("role", ROLES)
def test_lens(results: Path, material: Material, lopsided_run: Path, role: str) -> None:
    weights = load_file(lopsided_run / role / "model.safetensors")
    unembedding = weights["lm_head.weight"].astype(np.float64)
    tokenizer = material.tokenizer
    n_items = min(tokenizer.vocab_size, len(unembedding))
    texts = [tokenizer.decode([i]) for i in range(n_items)]
    keyword = np.array([any(word in text.lower() for word in E.analysis.keywords) for text in texts])

    def score(v: np.ndarray) -> tuple[float, float, float]:
        logits = unembedding[:n_items] @ v
        return float(logits[keyword].mean()), float(logits[~keyword].mean()), float(logits[~keyword].std())

    def error(values: list[float]) -> float:
        left_out = np.array(values[1:])
        return float(np.sqrt((len(left_out) - 1) * np.mean((left_out - left_out.mean()) ** 2)))

    def z_of(v: np.ndarray) -> float:
        mean, others, spread = score(v)
        return (mean - others) / spread

    lens, items, rises = [], [], []
    for source in ROLES:
        without = {layer: of_label(material, source, "backtracking", layer) for layer in KEPT}
        z = {layer: [z_of(v) for v in of.vectors()] for layer, of in without.items()}
        rise = [last - first for first, last in zip(z[0], z[2], strict=True)]
        n = {layer: of.n_problems for layer, of in without.items()}
        rises.append(
            {"source": source, "unembedding": role, "first": "0", "last": "2", "rise": rise[0], "error": error(rise)}
            | {"n_problems": min(n.values())}
        )
        for norm in (0, 1):
            for layer, v in enumerate(directions(results, source, "backtracking")):
                key = {"source": source, "unembedding": role, "final_norm": norm, "layer": layer}
                if norm:
                    v = v / np.sqrt(np.mean(v**2) + 1e-5)
                mean, others, spread = score(v)
                kept = layer in KEPT and not norm
                lens.append(
                    key
                    | {"score": mean, "others": others, "z": (mean - others) / spread}
                    | {"z_error": error(z[layer]) if kept else math.nan, "n_problems": n[layer] if kept else 0}
                )
            for side, sign in (("top", -1), ("bottom", 1)):
                for layer, v in enumerate(directions(results, source, "backtracking")):
                    if norm:
                        v = v / np.sqrt(np.mean(v**2) + 1e-5)
                    logits = unembedding[:n_items] @ v
                    for rank, token in enumerate(np.argsort(sign * logits, kind="stable")[:10].tolist()):
                        key = {"source": source, "unembedding": role, "final_norm": norm, "layer": layer}
                        items.append(key | {"side": side, "rank": rank, "logit": float(logits[token])})
    same(table(results, f"{role}.lens"), lens, rel=1e-3)
    same(table(results, f"{role}.lens_rise"), rises, rel=1e-3)
    found = table(results, f"{role}.lens_tokens")
    assert all(line["text"] == texts[line["token"]] for line in found)  # of ties, either
    same([{k: v for k, v in line.items() if k not in ("token", "text")} for line in found], items, rel=1e-4)


@pytest.mark.parametrize("role", ROLES)
def test_probe_and_projections(results: Path, material: Material, model: Callable[[str], Any], role: str) -> None:
    spec, rng = E.analysis, np.random.default_rng(E.seed)
    pairs = [pair for pair in material.pairs if pair[1].sections]
    assert len(pairs) == len(material.pairs) - 1
    read = [material.token_trace(role, *pair) for pair in pairs]
    replies = [np.arange(trace.reply_start, len(trace.ids)) for trace in read]
    at = [np.sort(rng.choice(reply, spec.positions, replace=False)) for reply in replies]
    batches = activations.read(model(role), read, replies, range(3), batch_size=len(pairs))
    states = dict(pair for batch in batches for pair in batch)  # of every token of the replies, at every layer
    x = np.concatenate([states[i][at[i] - replies[i][0]] for i in range(len(pairs))])
    traces = np.repeat(np.arange(len(pairs)), spec.positions)
    problems = np.array([trace.problem_id for trace, _ in pairs])
    fold = probe.folds(problems.tolist(), spec.folds, E.seed)
    assert all(len(set(fold[problems == name])) == 1 for name in problems) and set(fold) == {0, 1, 2}
    found = {(line["layer"], line["horizon"], line["method"]): line for line in table(results, f"{role}.probe")}
    methods = ["random directions"]
    methods += [f"{source}-derived {what}" for source in ROLES for what in ("direction", "shuffled labels")]
    expected_keys = [(layer, horizon, method) for layer in KEPT for horizon in spec.horizons for method in methods]
    logistic = [(LAST, horizon, "logistic regression") for horizon in spec.horizons]
    assert sorted(found) == sorted(expected_keys + logistic)
    where = [i for i, pair in enumerate(material.pairs) if pair in pairs]
    for layer in KEPT:
        for horizon in spec.horizons:
            starts = [[s for label, s in trace.starts if label == "backtracking"] for trace in read]
            soon = np.array([any(t < s <= t + horizon for s in starts[i]) for i in range(len(pairs)) for t in at[i]])
            for source in ROLES:
                (positive, n), (contrast, m) = (
                    [values[where] for values in means_by_trace(material, source, group, layer)]
                    for group in ("backtracking", "rest")
                )
                scores = np.full(len(x), np.nan)
                for f in range(spec.folds):
                    others, test = fold != f, fold[traces] == f
                    means = [
                        (np.nan_to_num(values[others]) * weights[others, None]).sum(0) / weights[others].sum()
                        for values, weights in ((positive, n), (contrast, m))
                    ]
                    v = means[0] - means[1]
                    centre = x[fold[traces] != f][:, layer].mean(0)
                    scores[test] = (x[test][:, layer] - centre) @ v / np.linalg.norm(v)
                line = found[layer, horizon, f"{source}-derived direction"]
                assert line["auc"] == pytest.approx(metrics.roc_auc_score(soon, scores), abs=1e-3)
                assert line["average_precision"] == pytest.approx(
                    metrics.average_precision_score(soon, scores), abs=1e-2
                )
                assert line["low"] < line["auc"] < line["high"] and line["error"] > 0
            for key, line in found.items():
                if key[:2] == (layer, horizon):
                    assert (line["role"], line["n_tokens"], line["n_positive"]) == (role, len(x), soon.sum())
                    assert line["n_problems"] == len(set(problems))
            drawn = np.random.default_rng(E.seed).standard_normal((50, 16), np.float32)
            aucs = [metrics.roc_auc_score(soon, x[:, layer] @ v) for v in drawn]
            line = found[layer, horizon, "random directions"]
            ends = np.quantile(aucs, [0.025, 0.975])
            assert [line[name] for name in ("auc", "low", "high")] == pytest.approx([np.mean(aucs), *ends], abs=2e-3)
    shown = json.loads((results / "5-analysis" / f"{role}.projections.json").read_text())
    assert shown["role"] == role and shown["layers"] == [0, 2] and len(shown["traces"]) == spec.shown
    names = [
        (source, label)
        for label in ("backtracking", *(n for n in sorted(LABELS) if n != "backtracking"))
        for source in ROLES
    ]
    names = [(source, label) for source, label in names if label in read_labels(results)]
    assert [(v["source"], v["label"]) for v in shown["vectors"]] == names
    ids = [trace.id for trace, _ in pairs]
    for trace in shown["traces"]:
        i = ids.index(trace["id"])
        assert (trace["category"], trace["problem"]) == (pairs[i][0].category, pairs[i][0].problem)
        assert trace["starts"] == [[label, start - read[i].reply_start] for label, start in read[i].starts]
        windows = {
            start + o - read[i].reply_start
            for label, start in read[i].starts
            if label == "backtracking"
            for o in range(-5, -1)
        }
        inside = {w for w in windows if w >= 0}
        assert set(trace["read"]) <= inside and len(inside) - len(trace["read"]) < 4
        assert "".join(trace["tokens"]) == material.tokenizer.decode(read[i].ids[read[i].reply_start :])
        for layer, rows in zip(shown["layers"], trace["values"], strict=True):
            centred = states[i][:, layer] - x[:, layer].mean(0, dtype=np.float64)
            for (source, label), values in zip(names, rows, strict=True):
                v = directions(results, source, label)[layer]
                np.testing.assert_allclose(values, centred @ v / np.linalg.norm(v), atol=2e-3)


@pytest.mark.parametrize("role", ROLES)
def test_log_odds(results: Path, material: Material, model: Callable[[str], Any], role: str) -> None:
    """The reasoning traces, unsteered and under every vector: what is added is built here from the files of stage 3."""
    lines = [line for line in table(results, f"{role}.log_odds") if line["text"] == forced.REASONING_TRACES]
    lines = [line for line in lines if line["kind"] != log_odds.EXAMPLES]
    first = {trace.problem_id: trace for trace in reversed(material.traces)}
    order = list(dict.fromkeys(trace.problem_id for trace in reversed(material.traces)))[::-1]
    taken = [order[i] for i in np.linspace(0, len(order) - 1, E.analysis.forced_texts).round().astype(int)]
    assert {line["problem_id"] for line in lines} == set(taken)
    norm = material.sums[role].norm_sum / material.sums[role].n_tokens
    texts, edits, starts = [], [], []
    for line in lines:
        trace = first[line["problem_id"]]
        end = trace.text.find("</think>")
        spans = split_sentences(trace.text[: end if end >= 0 else None])[1:]
        sections = tuple(records.Section("", *span) for span in spans)
        read = material.token_trace(role, trace, records.Annotation(trace.id, "", sections))
        starts.append([start for _, start in read.starts][: E.analysis.forced_sentences])
        assert line["n_starts"] == len(starts[-1])
        texts.append(read.ids)
        layer = line["layer"]
        edit = no_intervention(3, 16)
        if line["kind"] == "noise":
            key = generate.noise_key(generate.row_key(E.seed, line["problem_id"], 0))  # as of the first reply
            edit = gaussian_noise(layer, line["length"], key, n_layers=3, d_model=16)
        elif line["kind"] != "unsteered":
            assert line["length"] == pytest.approx(line["magnitude"] * norm[layer])
            if line["window"] == "-5..-2":
                v = directions(results, line["source"], line["kind"])[layer]
            else:
                s = material.sums[line["source"]]
                groups, w = list(s.plan.groups), s.plan.windows.index((-1, 0))
                of = [
                    s.sums[1, layer, groups.index(g), w] / s.counts[1, groups.index(g), w]
                    for g in ("backtracking", "rest")
                ]
                v = of[0] - of[1]
            edit = add_vector(jnp.asarray(v / np.linalg.norm(v), jnp.float32), layer, line["length"], n_layers=3)
        edits.append(edit)
    found = log_probabilities(model(role), texts, edits)
    keyword = [
        material.tokenizer.decode([i]).strip().lower() in ("wait", "hmm") for i in range(material.tokenizer.vocab_size)
    ]
    keyword = np.array(keyword + [False] * (found[0].shape[1] - len(keyword)))
    for line, log_p, of in zip(lines, found, starts, strict=True):
        p = [np.exp(log_p[start - 1])[keyword].sum() for start in of]
        expected = float(np.mean([np.log(x / (1 - x)) for x in p])) if p else math.nan
        assert line["log_odds"] == pytest.approx(expected, rel=1e-3, abs=1e-3, nan_ok=True), line
    assert (
        len({line["kind"] for line in lines}) == (4 if role == "reasoning" else 3)
        and len({round(line["log_odds"], 4) for line in lines}) > 10
    )
