"""Stage 5: what replies, vectors and activations show, as tables. Model by model, so that one is held at a time."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax import extract, inputs, labelling, vectors
from backtrack_jax.analysis import activations, agreement, coherence, logit_lens, probe, replies, similarity
from backtrack_jax.config import ROLES, Experiment
from backtrack_jax.data import records
from backtrack_jax.data.records import UNSTEERED, window_name
from backtrack_jax.data.text import KEYWORDS
from backtrack_jax.files import store, tables
from backtrack_jax.files.console import Progress, say
from backtrack_jax.inputs import spread
from backtrack_jax.judges import keyword
from backtrack_jax.judges.base import trace_judge
from backtrack_jax.models.batching import bucket
from backtrack_jax.stages import estimates
from backtrack_jax.stages.annotations import ANNOTATIONS
from backtrack_jax.stages.base import Context, Settled, Stage, spec_values
from backtrack_jax.stages.steering import STEERING
from backtrack_jax.stages.traces import TRACES
from backtrack_jax.stages.vectors import VECTORS


class AnalysisStage(Stage):
    """Every table that figures and page are drawn from."""

    name = "5-analysis"
    format = 4

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """What is measured, and what a judge of replies depends on."""
        judge = labelling.judge_of_replies(e)
        return {"analysis": spec_values(e.analysis, "batch_size"), "judge": judge.inputs(e) if judge else {}}

    def settle(self, e: Experiment, own: dict[str, Any], found: Settled) -> dict[str, Any]:
        """As for the labels of traces."""
        judge = labelling.judge_of_replies(e)
        return judge.settle(e, own, found, "judged.jsonl") if judge else own

    def model_roles(self, e: Experiment) -> Sequence[str]:
        """All."""
        return e.roles

    def prepare(self, context: Context) -> None:
        """What the judge of replies needs, such as a key."""
        if judge := labelling.judge_of_replies(context.experiment):
            judge.prepare(context.experiment)

    def check(self, context: Context) -> None:
        """Keywords that no token contains."""
        keywords = context.experiment.analysis.keywords
        try:
            logit_lens.keyword_ids(context.tokenizer, keywords)
        except ValueError as error:
            raise ValueError(f"analysis.keywords={keywords}: {error}") from error

    def notes(self, context: Context) -> list[str]:
        """Says so where the steered layer has no probe and no reliability."""
        layer, kept = context.experiment.steering.main_layer, context.experiment.vectors.layers
        if not kept or layer in kept:
            return []
        return [f"probe and reliability are of vectors.layers={kept}; add steering.layer={layer} there to have it"]

    def plan(self, context: Context) -> list[str]:
        """Likelihoods of all replies, activations of sampled and of shown tokens."""
        return _analysis(context)

    def run(self, context: Context, folder: Path) -> None:
        """Every analysis."""
        _analyse(context, folder)


ANALYSIS = AnalysisStage()

Pairs = Sequence[tuple[records.Trace, records.Annotation]]
Rows = list[dict[str, Any]]


def _analyse(context: Context, folder: Path) -> None:
    e = context.experiment
    read = context.folder(VECTORS)
    traces = TRACES.read(context.folder(TRACES))
    annotated = ANNOTATIONS.read(context.folder(ANNOTATIONS))
    pairs = records.pair_annotations(traces, annotated)
    sums = {role: VECTORS.read_sums(read, role) for role in e.roles}
    lines = [reply.line() for reply in STEERING.read(context.folder(STEERING))]
    partials = {role: folder / f"{role}.likelihoods.jsonl" for role in e.roles}
    judged_files = ("judged.jsonl", "judge_agreement.csv") if e.analysis.judge else ()
    has_replies = _all_there(folder, "replies.csv", *judged_files)
    for role in context.roles_by_need():
        if not has_replies:
            _likelihoods(context, role, partials[role], [line for line in lines if line["target"] == role])
        if not _all_there(folder, f"{role}.lens.csv", f"{role}.lens_tokens.csv"):
            _lens(context, role, folder)
        if not _all_there(folder, f"{role}.probe.csv", f"{role}.projections.json"):
            _probe(context, role, folder, pairs, sums)
    if not has_replies:
        answers, strengths = agreement.reply_traces(lines)
        labels = _judge_replies(context, folder, lines, answers, strengths)
        tables.write(folder / "replies.csv", _replies(context, partials, lines, answers, labels))
    for partial in partials.values():
        partial.unlink(missing_ok=True)
    rows = tables.read(folder / "replies.csv")
    tables.write(folder / "rates.csv", replies.summarise(rows, seed=e.seed))
    tables.write(folder / "effects.csv", replies.effects(rows))
    tables.write(folder / "similarity.csv", _similarity(context, sums))
    tables.write(folder / "label_cosines.csv", _label_cosines(context, sums))
    tables.write(folder / "reliability.csv", _reliability(context, sums, [trace for trace, _ in pairs]))
    tables.write(folder / "windows.csv", _windows(sums))
    tables.write(folder / "agreement.csv", _agreement(context, traces, annotated))


def _all_there(folder: Path, *names: str) -> bool:
    """Whether none of the files is missing: a finished stage may have lost any of them."""
    return all((folder / name).exists() for name in names)


def _likelihoods(context: Context, role: str, partial: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Log-likelihood of every reply under the unsteered model, appended batch by batch."""
    done = {line["row"] for line in store.recover_lines(partial)}
    if len(done) == len(lines):
        return
    asked = {line["problem"]: context.prompt_ids(role, line["problem"]) for line in lines}
    batches = coherence.log_likelihoods(
        context.model(role),
        [asked[line["problem"]] for line in lines],
        [line["ids"] for line in lines],
        batch_size=context.experiment.analysis.batch_size,
        done=done,
    )
    with Progress(f"  likelihood under the unsteered {role} model", len(lines), len(done)) as progress:
        for batch in batches:
            new = [(row, value) for row, value in batch if row not in done]
            store.append_lines(partial, [{"row": row, "log_likelihood": value} for row, value in new])
            progress.update(len(new), sum(len(lines[row]["ids"]) for row, _ in new))


def _judge_replies(
    context: Context,
    folder: Path,
    lines: Sequence[dict[str, Any]],
    traces: Sequence[records.Trace],
    strengths: dict[str, str],
) -> Sequence[records.Annotation | None]:
    """Every reply's labels by `analysis.judge`; and Table C.1, the keyword judge against it by strength.

    The table is of the model that writes the traces, unsteered and under its own vector at the experiment's layer.
    """
    e = context.experiment
    judge = labelling.judge_of_replies(e)
    if judge is None:
        return [None] * len(lines)
    found = judge.annotate(e, traces)
    records.write_jsonl(folder / "judged.jsonl", found)
    own = (e.vectors.label, e.author, e.steering.main_layer, window_name(e.vectors.window))
    kept = [
        i
        for i, line in enumerate(lines)
        if line["target"] == e.author
        and (line["kind"] == UNSTEERED or (line["kind"], line["source"], line["layer"], line["window"]) == own)
    ]
    rows = agreement.agreement(
        [traces[i] for i in kept],
        [found[i] for i in kept],
        [keyword.annotate(traces[i]) for i in kept],
        unit="sentence",
        groups=strengths,
    )
    tables.write(folder / "judge_agreement.csv", _agreement_rows(rows))
    return found


def _replies(
    context: Context,
    partials: dict[str, Path],
    lines: Sequence[dict[str, Any]],
    traces: Sequence[records.Trace],
    labels: Sequence[records.Annotation | None],
) -> Rows:
    """One row per reply, in the order of generations.jsonl."""
    ids = logit_lens.word_ids(context.tokenizer, KEYWORDS)
    found = {
        role: [line["log_likelihood"] for line in sorted(store.read_lines(partial), key=lambda line: line["row"])]
        for role, partial in partials.items()
        if partial.exists()
    }
    numbers = dict.fromkeys(partials, 0)
    texts: dict[tuple[str, str], str] = {}
    rows = []
    for number, line in enumerate(lines):
        role = line["target"]
        asked = (role, line["problem"])
        if asked not in texts:
            texts[asked] = context.tokenizer.decode(context.prompt_ids(*asked))
        likelihood = found[role][numbers[role]]
        rows.append(replies.measure(traces[number], line, texts[asked], ids, likelihood, labels[number]))
        numbers[role] += 1
    return rows


def _lens(context: Context, role: str, folder: Path) -> None:
    """Fig. 5: vectors of every model through this model's unembedding, as in Eq. 2 and with the final norm."""
    e = context.experiment
    n_items = min(
        context.tokenizer.vocab_size, context.model(role).config.vocab_size
    )  # markers may be beyond an embedding
    ids = [i for i in logit_lens.keyword_ids(context.tokenizer, e.analysis.keywords) if i < n_items]
    scores, items = [], []
    for source in e.roles:
        vector = VECTORS.load(context.folder(VECTORS), source, e.vectors.label)
        for final_norm in (False, True):
            lens = logit_lens.logit_lens(
                context.model(role),
                vector.directions,
                ids,
                n_items=n_items,
                final_norm=final_norm,
            )
            key = {"source": source, "unembedding": role, "final_norm": int(final_norm)}
            for layer, (score, others) in enumerate(zip(lens.score, lens.others, strict=True)):
                scores.append(key | {"layer": layer, "score": float(score), "others": float(others)})
            for side, found, logits in (
                ("top", lens.top, lens.top_logits),
                ("bottom", lens.bottom, lens.bottom_logits),
            ):
                items += [
                    key
                    | {"layer": layer, "side": side, "rank": rank, "token": int(token), "logit": float(logit)}
                    | {"text": context.tokenizer.decode([int(token)])}
                    for layer in range(len(found))
                    for rank, (token, logit) in enumerate(zip(found[layer], logits[layer], strict=True))
                ]
    tables.write(folder / f"{role}.lens.csv", scores)
    tables.write(folder / f"{role}.lens_tokens.csv", items)


def _probe(context: Context, role: str, folder: Path, pairs: Pairs, sums: dict[str, extract.WindowSums]) -> None:
    """Section 4.2 and Fig. 6: projections on the directions, as a probe and token by token for a few traces."""
    e, spec = context.experiment, context.experiment.analysis
    labelled = [pair for pair in pairs if pair[1].sections]  # no label is not "no backtracking"
    if len(labelled) < len(pairs):
        say(f"  the probe leaves {len(pairs) - len(labelled)} traces without labels out")
    pairs = labelled
    layers = sorted({*e.vectors.layers, e.steering.main_layer})
    read = [context.token_trace(role, trace, annotation) for trace, annotation in pairs]
    rng = np.random.default_rng(e.seed)
    replies_at = [np.arange(trace.reply_start, len(trace.ids)) for trace in read]
    chosen = [np.sort(rng.choice(at, min(spec.positions, len(at)), replace=False)) for at in replies_at]
    with Progress(f"  activations of the {role} model", len(read)) as progress:
        sampled = _read_activations(context, role, read, chosen, layers, progress)
    of_layer = [np.concatenate([states[:, n] for states in sampled]) for n in range(len(layers))]
    mean = np.stack([states.mean(0, dtype=np.float64) for states in of_layer])
    del sampled
    shown = _shown(context, read)
    with Progress(f"  projections of the {role} model", len(shown)) as progress:
        whole = _read_activations(
            context, role, [read[i] for i in shown], [replies_at[i] for i in shown], layers, progress, batch_size=1
        )
    projected = _projections(context, role, [(*pairs[i], read[i]) for i in shown], whole, mean, layers)
    store.write_text(folder / f"{role}.projections.json", json.dumps(projected, ensure_ascii=False) + "\n")
    traces = np.repeat(np.arange(len(read)), [len(at) for at in chosen])
    rows: Rows = []
    for layer in e.vectors.layers:
        for horizon in spec.horizons:
            starts = [[at for label, at in trace.starts if label == e.vectors.label] for trace in read]
            soon = [probe.starts_soon(s, at, horizon) for s, at in zip(starts, chosen, strict=True)]
            tokens = probe.Tokens(of_layer[layers.index(layer)], traces, np.concatenate(soon))
            rows += _probe_rows(context, role, layer, horizon, tokens, [trace for trace, _ in pairs], sums)
    tables.write(folder / f"{role}.probe.csv", rows)


def _read_activations(
    context: Context,
    role: str,
    traces: Sequence[extract.TokenTrace],
    at: Sequence[np.ndarray],
    layers: Sequence[int],
    progress: Progress,
    batch_size: int = 0,
) -> list[np.ndarray]:
    """[positions, layers, D] of every trace."""
    found: dict[int, np.ndarray] = {}
    size = batch_size or context.experiment.analysis.batch_size
    for batch in activations.read(context.model(role), traces, at, layers, batch_size=size):
        found |= dict(batch)
        progress.update(len(batch), sum(len(traces[i].ids) for i, _ in batch))
    return [found[i] for i in range(len(traces))]


def _probe_rows(
    context: Context,
    role: str,
    layer: int,
    horizon: int,
    tokens: probe.Tokens,
    traces: Sequence[records.Trace],
    sums: dict[str, extract.WindowSums],
) -> Rows:
    """Scores of the directions, random ones, and a logistic regression at the steered layer, on the same tokens."""
    e, spec = context.experiment, context.experiment.analysis
    problems = [trace.problem_id for trace in traces]
    ids = [trace.id for trace in traces]
    fold = probe.folds(problems, spec.folds, e.seed)
    of_token = np.array(problems)[tokens.traces]
    scored = {}
    for source, total in sums.items():
        groups = (e.vectors.label, e.vectors.contrast)
        positive, contrast = (total.means_by_trace(ids, group, layer) for group in groups)
        weights = _weights(total, ids, groups, e.vectors.estimator)
        scored[f"{source}-derived direction"] = probe.direction_scores(tokens, positive, contrast, fold, weights)
    if layer == e.steering.main_layer:
        scored["logistic regression"] = probe.logistic_scores(tokens, fold)
    everywhere = np.ones(len(of_token), bool)
    found = [("random directions", everywhere, probe.random_score(tokens, seed=e.seed))]
    for method, values in scored.items():
        kept = np.isfinite(values)
        score = probe.score(values[kept], tokens.positive[kept], of_token[kept].tolist())
        found.append((method, kept, score))
    return [
        {"role": role, "layer": layer, "horizon": horizon, "method": method}
        | dataclasses.asdict(score)
        | {"n_tokens": int(kept.sum()), "n_positive": int(tokens.positive[kept].sum())}
        | {"n_problems": len(set(of_token[kept]))}
        for method, kept, score in found
    ]


def _weights(
    total: extract.WindowSums, ids: Sequence[str], groups: tuple[str, str], estimator: str
) -> tuple[np.ndarray, np.ndarray]:
    """How much each trace counts in the means of D+ and D, [n] each, so that they are those of the run's vectors."""
    return total.weights_by_trace(ids, groups[0], estimator), total.weights_by_trace(ids, groups[1], estimator)


def _shown(context: Context, read: Sequence[extract.TokenTrace]) -> list[int]:
    """Which traces the report shows: spread over those with a section of the experiment's label, if there are any."""
    label = context.experiment.vectors.label
    marked = [i for i, trace in enumerate(read) if any(name == label for name, _ in trace.starts)]
    return spread(marked or list(range(len(read))), context.experiment.analysis.shown)


def _projections(
    context: Context,
    role: str,
    shown: Sequence[tuple[records.Trace, records.Annotation, extract.TokenTrace]],
    whole: Sequence[np.ndarray],
    mean: np.ndarray,
    layers: Sequence[int],
) -> dict[str, Any]:
    """Tokens of a few traces with the projections of their centred activations on every unit direction."""
    folder = context.folder(VECTORS)
    names = [
        (source, label)
        for label in context.experiment.shown_vectors(_labels(folder))
        for source in context.experiment.roles
    ]
    names = [name for name in names if VECTORS.has(folder, *name)]
    units = {name: VECTORS.load(folder, *name) for name in names}
    traces = []
    for (trace, _, tokens), states in zip(shown, whole, strict=True):
        centred = states - mean
        values = [[centred[:, n] @ units[name].unit(layer) for name in names] for n, layer in enumerate(layers)]
        traces.append(
            {
                "id": trace.id,
                "category": trace.category,
                "problem": trace.problem,
                "tokens": _pieces(context, tokens),
                "starts": [[label, at - tokens.reply_start] for label, at in tokens.starts],
                "read": _read_in_reply(context, tokens),
                "values": [[[round(float(x), 3) for x in row] for row in rows] for rows in values],
            }
        )
    return {
        "role": role,
        "layers": list(layers),
        "vectors": [{"source": source, "label": label} for source, label in names],
        "traces": traces,
    }


def _read_in_reply(context: Context, trace: extract.TokenTrace) -> list[int]:
    """Tokens of a reply that a window of the experiment's label reads."""
    v = context.experiment.vectors
    windows = [
        extract.read_positions(trace, at, v.window, v.into_prompt) for label, at in trace.starts if label == v.label
    ]
    read = {at - trace.reply_start for window in windows for at in window or ()}
    return sorted(at for at in read if at >= 0)


def _labels(folder: Path) -> list[str]:
    return VECTORS.read_summary(folder)["labels"]


def _pieces(context: Context, trace: extract.TokenTrace) -> list[str]:
    """Text of each reply token; a character of several tokens stands with the first of them."""
    text, spans = context.tokenizer.decode_with_spans(trace.ids[trace.reply_start :])
    pieces, end = [], 0
    for start, stop in spans:
        pieces.append(text[max(start, end) : stop])
        end = max(end, stop)
    return pieces


def _similarity(context: Context, sums: dict[str, extract.WindowSums]) -> Rows:
    """Text 3.2: norms of every label's vectors, and the cosine of the two models' ones, at every layer."""
    rows = []
    for label in _labels(context.folder(VECTORS)):
        if not all(VECTORS.has(context.folder(VECTORS), role, label) for role in sums):
            continue
        found = {role: VECTORS.load(context.folder(VECTORS), role, label) for role in sums}
        cosines = vectors.cosine(found["base"], found["reasoning"]) if len(found) == len(ROLES) else None
        for layer in range(len(next(iter(found.values())).directions)):
            row = {"label": label, "layer": layer, "cosine": float("nan") if cosines is None else float(cosines[layer])}
            rows.append(row | {f"norm_{role}": float(vector.norms[layer]) for role, vector in found.items()})
    return rows


def _label_cosines(context: Context, sums: dict[str, extract.WindowSums]) -> Rows:
    """Cosines of every two labels' vectors of one model at every layer."""
    rows = []
    for role in sums:
        folder = context.folder(VECTORS)
        labels = [label for label in _labels(folder) if VECTORS.has(folder, role, label)]
        found = {label: VECTORS.load(folder, role, label) for label in labels}
        labels = [label for label in (*records.LABELS, *sorted(found)) if label in found]
        labels = list(dict.fromkeys(labels))
        for layer in range(sums[role].sums.shape[1]):
            matrix = similarity.cosine_matrix(np.stack([found[label].at(layer) for label in labels]))
            rows += [
                {"role": role, "layer": layer, "label": a, "other": b, "cosine": float(matrix[i, j])}
                for i, a in enumerate(labels)
                for j, b in enumerate(labels)
            ]
    return rows


def _reliability(context: Context, sums: dict[str, extract.WindowSums], traces: Sequence[records.Trace]) -> Rows:
    """Split-half cosine of every label's vector at the layers whose trace means were kept."""
    spec = context.experiment.vectors
    problems = [trace.problem_id for trace in traces]
    ids = [trace.id for trace in traces]
    rows = []
    for role, total in sums.items():
        for layer in total.plan.layers:
            for label in (name for name in total.plan.groups if name not in ("all", "rest")):
                groups = (label, spec.contrast if label == spec.label else "all")
                positive, contrast = (total.means_by_trace(ids, group, layer) for group in groups)
                weights = _weights(total, ids, groups, spec.estimator)
                found = similarity.split_half(
                    positive, contrast, problems, weights=weights, seed=context.experiment.seed
                )
                rows.append({"role": role, "layer": layer, "label": label} | found._asdict())
    return rows


def _windows(sums: dict[str, extract.WindowSums]) -> Rows:
    """Windows read and dropped, of every group of labels and window."""
    return [
        {"role": role, "label": label, "window": f"{first}..{last}"}
        | {"read": int(total.read[g, w]), "dropped": int(total.dropped[g, w])}
        for role, total in sums.items()
        for g, label in enumerate(total.plan.groups)
        for w, (first, last) in enumerate(total.plan.windows)
    ]


def _agreement(context: Context, traces: Sequence[records.Trace], annotated: Sequence[records.Annotation]) -> Rows:
    """Table C.1 on the traces: the keyword judge against the labels of the run, where these are another judge's."""
    if trace_judge(context.experiment) == keyword.JUDGE.name or context.experiment.vectors.label != "backtracking":
        return []
    found = agreement.agreement(traces, annotated, [keyword.annotate(trace) for trace in traces], unit="sentence")
    say(f"  keyword judge against the labels: F1 {100 * found[0].f1.value:.1f} %")
    return _agreement_rows(found)


def _agreement_rows(found: Sequence[agreement.Agreement]) -> Rows:
    return [
        {"group": row.group, "unit": row.unit, "n_units": row.n_units, "n_reference": row.n_reference}
        | {name: getattr(row, name) for name in ("n_traces", "n_problems", "left_out_units", "left_out_traces")}
        | {
            f"{name}{suffix}": getattr(getattr(row, name), field)
            for name in ("precision", "recall", "f1", "kappa")
            for suffix, field in (("", "value"), ("_low", "low"), ("_high", "high"))
        }
        for row in found
    ]


def _analysis(context: Context) -> list[str]:
    """Likelihoods of all replies, activations of sampled and of shown tokens."""
    e, spec = context.experiment, context.experiment.analysis
    lengths, rows = estimates.trace_lengths(e), estimates.steered_rows(e)
    lines = []
    for role in e.roles:
        tokens = rows[role] * (estimates.longest_prompt(e) + e.steering.max_new_tokens)
        lines.append(
            f"{role} model: likelihood of {rows[role]} replies, at most {tokens:,} tokens; activations of "
            f"{len(lengths)} traces, about {sum(lengths):,} tokens, {len(lengths) * spec.positions:,} of them kept"
        )
        config = inputs.architecture(e.model(role).path)
        if config is None:
            lines.append(estimates.unknown_memory(e, role))
            continue
        rows_at_once = -(-spec.batch_size // e.data_parallel)
        layers = len({*e.vectors.layers, e.steering.main_layer})
        kept = 4 * len(lengths) * spec.positions * layers * config.d_model
        gathered = 4 * config.n_layers * rows_at_once * bucket(spec.positions) * config.d_model
        of_position = spec.batch_size * config.vocab_size
        logits = 4 * max(min(1 << 27, 256 * of_position), of_position) // (e.data_parallel * e.model_parallel)
        lines.append(
            f"  {estimates.memory(e)}: weights {estimates.weights(e, role, config)}, "
            f"activations {estimates.gigabytes(gathered)} and on the host "
            f"{estimates.gigabytes(kept)}, logits about {estimates.gigabytes(logits)}"
        )
    return [*lines, *_judged_replies(context, rows)]


def _judged_replies(context: Context, rows: Mapping[str, int]) -> list[str]:
    """What labelling the steered replies takes."""
    e = context.experiment
    judge = labelling.judge_of_replies(e)
    if judge is None:
        return []
    if folder := context.finished(STEERING):
        lines = [reply.line() for reply in STEERING.read(folder)]
        return judge.plan(e, agreement.reply_traces(lines)[0])
    standing = records.Problem("-", "-", "X" * estimates.CHARACTERS_PER_TOKEN * estimates.longest_prompt(e))
    return estimates.judging(e, judge, [(standing, 0)] * sum(rows.values()), e.steering.max_new_tokens)
