"""Which features of a sparse autoencoder the vector is made of, and whether they act as it does.

Rows of the decoder are directions in the residual stream, and so is the difference of means: they are compared by
cosine and by what they spell. Features are activations as well: how well they tell, in the window before a section, the
experiment's label from others. The sum of the rows nearest to the vector is then added in its place, at equal length,
beside sums of other rows that spell the keywords as loudly: what both do to the log-odds on given text.

    {role}.sae.csv          the autoencoder on this model's activations, and the largest cosine beside chance
    {role}.sae_rows.csv     the first rows of each of the three rankings
    {role}.sae_effects.csv  log-odds of every text under every condition
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special, stats

from backtrack_jax import sae_files
from backtrack_jax.analysis import activations, log_odds, logit_lens, probe
from backtrack_jax.analysis.base import Material, Planned, Question
from backtrack_jax.analysis.claims import Claim, measured
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.forced import REASONING_TRACES, Forced, given_text, logits_at_once, texts_of
from backtrack_jax.analysis.plots import COLOURS, MARKERS, Panel, Plot, Series
from backtrack_jax.analysis.results import Results, extent
from backtrack_jax.analysis.statistics import NAN, Region
from backtrack_jax.config import Experiment
from backtrack_jax.data.problems import spread
from backtrack_jax.data.records import UNSTEERED
from backtrack_jax.data.text import sentence_spans
from backtrack_jax.extract import read_positions
from backtrack_jax.files import store
from backtrack_jax.files.console import Progress
from backtrack_jax.files.paths import data_path, local_path
from backtrack_jax.files.tables import Table
from backtrack_jax.intervention import Intervention, ablate_from, add_vector, no_intervention
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.sae_files import SAE

VECTOR, TOP, CONTROL, SINGLE = "the vector", "sum of the nearest rows", "matched rows", "single row"
WITHOUT, ABLATED = "the vector without the rows", "the rows ablated"
_ORDER = (VECTOR, TOP, CONTROL, SINGLE, WITHOUT, ABLATED)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Activations in the windows before sections.

    Attributes:
      tokens: [S, W, D] float32, W positions of each of S windows.
      positive: [S] bool, whether the section has the experiment's label.
      problems: [S], problem of each section.
    """

    tokens: np.ndarray
    positive: np.ndarray
    problems: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ranked:
    """What is known of every row of a decoder, [d_sae] each.

    Attributes:
      cosine: with the vector.
      keyword_logit: of the row at norm 1.
      auc_chosen: of the feature's mean activation in a window, on the half of the problems that features are chosen on.
      auc: on the other half.
      active: share of the windows in which the feature is active.
    """

    cosine: np.ndarray
    keyword_logit: np.ndarray
    auc_chosen: np.ndarray
    auc: np.ndarray
    active: np.ndarray


class SaeDirections(Question):
    """Rows of a decoder beside the vector."""

    name = "sae"
    of_replies = False
    settings = (
        *("seed", "analysis.keywords", "analysis.forced_texts", "analysis.forced_sentences"),
        *("steering.magnitudes", "steering.unit", "steering.span"),
    )
    role_tables = ("sae", "sae_rows", "sae_effects")

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """The settings, and the autoencoder by content."""
        path = e.questions.sae.path
        there = bool(path) and local_path(path).is_dir()
        return super().inputs(e) | {"content": store.weights_hash(local_path(path)) if there else ""}

    def scratch(self, role: str) -> list[str]:
        """Finished rows, appended batch by batch."""
        return [f"{role}.sae_effects.jsonl"]

    def of_role(self, material: Material, role: str, folder: Path) -> dict[str, Table]:
        """Ranks the rows, then adds the first ones on given text."""
        e, q = material.experiment, material.experiment.questions.sae
        model = material.model(role)
        sae = sae_files.load(data_path(q.path), d_model=model.config.d_model, n_layers=model.config.n_layers)
        v = material.vectors[role, e.vectors.label].at(sae.layer)
        windows = read_windows(material, role, sae.layer)
        ids = logit_lens.keyword_ids(material.tokenizer, e.analysis.keywords)
        read_out = keyword_direction(model, ids, n_items=material.tokenizer.vocab_size)
        ranked = rank(sae, v, read_out, windows, seed=e.seed)
        nearest = np.argsort(-ranked.cosine, kind="stable")[: q.top]
        controls = matched(ranked, nearest, q.controls, sae.d_model, seed=e.seed)
        return {
            "sae": [_summary(sae, v, ranked, nearest, windows) | {"role": role}],
            "sae_rows": _rows_table(sae, role, ranked, windows, q.listed, e.seed),
            "sae_effects": self._effects(material, role, folder, sae, v, read_out, nearest, controls),
        }

    def _effects(
        self,
        material: Material,
        role: str,
        folder: Path,
        sae: SAE,
        v: np.ndarray,
        read_out: np.ndarray,
        nearest: np.ndarray,
        controls: np.ndarray,
    ) -> Table:
        """A forward pass for every text under every condition."""
        e = material.experiment
        length = _length(material, role, sae.layer)
        made = conditions(sae, v, nearest, controls, length, n_layers=material.model(role).config.n_layers, e=e)
        lines, rows = [], []
        for trace in texts_of(material)[REASONING_TRACES]:
            ids, prompt_length, starts = given_text(material, role, trace, sentence_spans(trace)[1:])
            for (condition, number), (direction, row) in made.items():
                rows.append(Forced(ids, prompt_length, starts, row))
                spelt = NAN if direction is None else float(direction @ read_out)
                line = {"role": role, "layer": sae.layer, "condition": condition, "number": number}
                lines.append(line | {"length": length, "keyword_logit": spelt, "problem_id": trace.problem_id})
        partial = folder / self.scratch(role)[0]
        title = f"log-odds of the {role} model under rows of the autoencoder"
        found = log_odds.resumed(material, role, rows, partial, title)
        return [line | {"log_odds": value} for line, value in zip(lines, found, strict=True)]

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """What each condition does, and where the nearest rows stand."""
        return [by_condition(r), rankings(r)]

    def sentences(self, r: Results) -> Sequence[str]:
        """The primary contrast on the model that writes the traces."""
        effects = effects_of(r, r.author)
        both = paired(effects, TOP, CONTROL)
        if len(both) < 2:
            return []
        difference = both[:, 0] - both[:, 1]
        low, high = log_odds.interval(difference)
        whole = np.mean(list(effects[VECTOR].values()))
        k, author = r.experiment.questions.sae.top, r.author
        return [
            f"On given text, the sum of the {k} rows of the autoencoder's decoder nearest to the {author}-derived "
            f"vector changes the {author} model's log-odds of wait or hmm by {both[:, 0].mean():.2f} nats, "
            f"and rows matched in keyword logit by {both[:, 1].mean():.2f} (difference {difference.mean():.2f}, "
            f"{low:.2f} to {high:.2f}, {len(both)} problems); the vector itself does so by {whole:.2f}, at the same "
            "length."
        ]

    def claims(self, r: Results) -> Sequence[Claim]:
        """That the nearest rows do more than rows which spell the keywords as loudly."""
        both = paired(effects_of(r, r.author), TOP, CONTROL)
        if len(both) < 2:
            return []
        difference = both[:, 0] - both[:, 1]
        return [
            measured(
                "sae",
                "The rows of an autoencoder nearest to the vector raise the keywords more than matched rows.",
                figure="sae_effects",
                where="-",
                rule="change of the log-odds on given text under the sum of the nearest rows, less that under matched "
                "rows of the same length, is above 0",
                estimate=float(difference.mean()),
                interval=log_odds.interval(difference, LEVEL),
                unit="nats",
                region=Region(low=0),
                n=len(both),
            )
        ]

    def plan(self, planned: Planned) -> str:
        """Texts under all conditions."""
        e, q = planned.experiment, planned.experiment.questions.sae
        texts = min(e.analysis.forced_texts, len(planned.trace_tokens))
        read = min(q.traces or len(planned.trace_tokens), len(planned.trace_tokens))
        n = texts * (5 + q.controls + q.singles)
        return f"windows of {read:,} traces through the autoencoder, log-odds after at most {n:,} texts"

    def memory(self, planned: Planned, config: ModelConfig) -> dict[str, int]:
        """A block of the encoder, and the logits of some positions of a batch."""
        e = planned.experiment
        devices = e.data_parallel * e.model_parallel
        logits = 4 * logits_at_once(e.analysis.batch_size, config.vocab_size) // devices
        return {"logits after given texts": logits, "a block of the encoder": 4 * sae_files.BLOCK * config.d_model}


SAE_DIRECTIONS = SaeDirections()


def chance_cosine(n: int, d_model: int, quantile: float = 0.5) -> float:
    """Quantile of the largest |cosine| of a direction with n others that know nothing of it.

    The square of one such cosine has the distribution Beta(1/2, (D - 1)/2). Of many, the usual
    estimate sqrt(2 ln(2n) / D) lies between the median and the 95 % quantile.
    """
    return math.sqrt(special.betaincinv(0.5, (d_model - 1) / 2, quantile ** (1 / n)))


def keyword_direction(model: Decoder, ids: Sequence[int], *, n_items: int) -> np.ndarray:
    """The direction whose product with another is the latter's keyword logit, [D] float32.

    The logit is the mean of W_U (g * x) over the keyword items, g the weight of the final norm, less that over all
    other items that have a text.
    """
    selected = np.zeros(model.config.vocab_size, np.float32)
    selected[list(ids)] = 1 / len(ids)
    others = np.zeros(model.config.vocab_size, np.float32)
    others[:n_items] = selected[:n_items] == 0
    weights = jnp.asarray(selected - others / others.sum())
    norm = model.norm.weight[...].astype(jnp.float32)
    linear = jax.jit(jax.grad(lambda x, model: jnp.sum(weights * model.unembed(x * norm))))
    return np.asarray(linear(jnp.zeros(model.config.d_model), model), np.float32)


def read_windows(material: Material, role: str, layer: int) -> Windows:
    """Activations at a layer in the experiment's window before every section of some traces."""
    e, v = material.experiment, material.experiment.vectors
    pairs = spread(material.pairs, e.questions.sae.traces)
    traces = [material.token_trace(role, *pair) for pair in pairs]
    spans = [
        [(label, at) for label, start in t.starts if (at := read_positions(t, start, v.window, v.into_prompt))]
        for t in traces
    ]
    width = v.window[1] - v.window[0] + 1
    at = [np.array([p for _, positions in own for p in positions], np.int64) for own in spans]
    found: dict[int, np.ndarray] = {}
    with Progress(f"  windows of the {role} model", len(traces)) as progress:
        for batch in activations.read(material.model(role), traces, at, [layer], batch_size=e.analysis.batch_size):
            found |= dict(batch)
            progress.update(len(batch), sum(len(traces[i].ids) for i, _ in batch))
    tokens = [found[i][:, 0].reshape(-1, width, found[i].shape[-1]) for i in range(len(traces))]
    problems = [trace.problem_id for (trace, _), own in zip(pairs, spans, strict=True) for _ in own]
    positive = [label == v.label for own in spans for label, _ in own]
    return Windows(np.concatenate(tokens), np.array(positive, bool), np.array(problems, str))


def rank(sae: SAE, v: np.ndarray, read_out: np.ndarray, windows: Windows, *, seed: int = 0) -> Ranked:
    """All three measures of every row, block by block.

    Args:
      sae: the autoencoder.
      v: [D], the vector.
      read_out: [D], as `keyword_direction` gives it.
      windows: of S sections, of which features are measured.
      seed: of the halves of the problems.
    """
    S, W, D = windows.tokens.shape
    chosen = probe.folds(windows.problems.tolist(), 2, seed) == 0
    parts: list[tuple[np.ndarray, ...]] = []
    for features, values in sae.encode(windows.tokens.reshape(S * W, D)):
        means = values.reshape(S, W, -1).mean(1)
        rows = sae.decoder(features)
        norms = np.linalg.norm(rows, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            units = np.where(norms[:, None] > 0, rows / norms[:, None], 0)
        cosines = units @ (v / np.linalg.norm(v))
        aucs = [auc_of_columns(means[half], windows.positive[half]) for half in (chosen, ~chosen)]
        parts.append((cosines, units @ read_out, *aucs, (means > 0).mean(0)))
    return Ranked(*(np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True)))


def auc_of_columns(values: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Probability that a positive row is above another one, ties counting half, by column: [S, F] to [F]; or NaN."""
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return np.full(values.shape[1], NAN)
    ranks = stats.rankdata(values, axis=0)[positive].sum(0)
    return (ranks - n * (n + 1) / 2) / (n * m)


def matched(ranked: Ranked, nearest: np.ndarray, n_sets: int, d_model: int, *, seed: int = 0) -> np.ndarray:
    """Rows that spell the keywords as the nearest ones do, and are no nearer to the vector than chance.

    Of the rows whose |cosine| is below the 95 % quantile of a random direction's, each of the nearest rows takes those
    with the keyword logit closest to its own, one for each set; none is taken twice.

    Returns:
      [sets, k] int, at most `n_sets` sets.

    Raises:
      ValueError: there are too few such rows for a single set.
    """
    free = np.abs(ranked.cosine) < chance_cosine(1, d_model, 0.95)
    free[nearest] = False
    n_sets = min(n_sets, int(free.sum()) // len(nearest))
    if not n_sets:
        raise ValueError(
            f"questions.sae.top={len(nearest)}: only {int(free.sum())} of {len(free)} rows are no nearer to the vector "
            "than chance, expected at least as many, as controls; lower it"
        )
    sets = np.empty((n_sets, len(nearest)), int)
    rng = np.random.default_rng(seed)
    for column, row in enumerate(nearest):
        apart = np.where(free, np.abs(ranked.keyword_logit - ranked.keyword_logit[row]), np.inf)
        closest = np.argsort(apart, kind="stable")[:n_sets]
        free[closest] = False
        sets[:, column] = rng.permutation(closest)
    return sets


def conditions(
    sae: SAE,
    v: np.ndarray,
    nearest: np.ndarray,
    controls: np.ndarray,
    length: float,
    *,
    n_layers: int,
    e: Experiment,
) -> dict[tuple[str, int], tuple[np.ndarray | None, Intervention]]:
    """(condition, number) -> the direction that is added at norm 1 (None: nothing is), and the row of an intervention.

    Every direction is added at the same length but for the vector without the rows, which keeps what is left of it.
    """
    span: Any = e.steering.span
    unit = lambda x: (x / np.linalg.norm(x)).astype(np.float32)  # noqa: E731
    rows = {int(i): unit(sae.row(int(i)).astype(np.float64)) for i in {*nearest.tolist(), *controls.ravel().tolist()}}
    summed = lambda some: unit(np.sum([rows[int(i)] for i in some], axis=0, dtype=np.float64))  # noqa: E731
    directions = {(VECTOR, 0): unit(v.astype(np.float64)), (TOP, 0): summed(nearest)}
    directions |= {(CONTROL, number): summed(some) for number, some in enumerate(controls)}
    directions |= {(SINGLE, int(i)): rows[int(i)] for i in nearest[: e.questions.sae.singles]}
    made: dict[tuple[str, int], tuple[np.ndarray | None, Intervention]] = {
        (UNSTEERED, 0): (None, no_intervention(n_layers, sae.d_model, span))
    }
    for name, direction in directions.items():
        made[name] = direction, add_vector(jnp.asarray(direction), sae.layer, length, n_layers=n_layers, span=span)
    basis = np.stack([rows[int(i)] for i in nearest])
    left = outside(directions[VECTOR, 0], basis)
    made[WITHOUT, 0] = left, add_vector(jnp.asarray(left), sae.layer, length, n_layers=n_layers, span=span)
    made[ABLATED, 0] = None, ablate_from(jnp.asarray(basis), sae.layer, n_layers=n_layers, span=span)
    return made


def outside(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What is left of x [D] outside of the span of rows [k, D]; float32."""
    weights = np.linalg.lstsq(rows.T.astype(np.float64), x.astype(np.float64), rcond=None)[0]
    return (x - rows.T @ weights).astype(np.float32)


def _length(material: Material, role: str, layer: int) -> float:
    """Norm of all that is added: a magnitude in the unit of the experiment."""
    e = material.experiment
    return material.length(role, layer, e.questions.sae.magnitude or max(e.steering.magnitudes))


def _summary(sae: SAE, v: np.ndarray, ranked: Ranked, nearest: np.ndarray, windows: Windows) -> dict[str, Any]:
    tokens = windows.tokens.reshape(-1, sae.d_model)
    rebuilt, active = sae.rebuild(tokens)
    centred = tokens - tokens.mean(0, dtype=np.float64)
    explained = 1 - np.sum((tokens - rebuilt) ** 2, dtype=np.float64) / np.sum(centred**2)
    unit = v / np.linalg.norm(v)
    left = outside(unit, np.stack([sae.row(int(i)) for i in nearest]))
    return {
        "layer": sae.layer,
        "architecture": sae.architecture,
        "d_sae": sae.d_sae,
        "d_model": sae.d_model,
        "largest_cosine": float(np.abs(ranked.cosine).max()),
        "chance_cosine": chance_cosine(sae.d_sae, sae.d_model),
        "chance_cosine_95": chance_cosine(sae.d_sae, sae.d_model, 0.95),
        "in_span": float(1 - np.sum(left.astype(np.float64) ** 2)),
        "explained_variance": float(explained),
        "active_features": float(active.mean()),
        "n_tokens": len(tokens),
        "n_problems": len(np.unique(windows.problems)),
    }


def _rows_table(sae: SAE, role: str, ranked: Ranked, windows: Windows, listed: int, seed: int) -> Table:
    """The first rows by each ranking, with an interval of the AUC on the half that did not choose them."""
    keys = {
        "cosine": -ranked.cosine,
        "keyword": -ranked.keyword_logit,
        "auc": -np.abs(np.nan_to_num(ranked.auc_chosen, nan=0.5) - 0.5),
    }
    orders = {name: np.argsort(key, kind="stable") for name, key in keys.items()}
    places = {name: np.argsort(order) + 1 for name, order in orders.items()}
    shown = sorted({int(row) for order in orders.values() for row in order[:listed]})
    held_out = probe.folds(windows.problems.tolist(), 2, seed) != 0
    _, W, D = windows.tokens.shape
    tokens = windows.tokens[held_out].reshape(-1, D)
    lines = []
    for features, values in sae.encode(tokens):
        for row in (row for row in shown if row in features):
            means = values[:, row - features.start].reshape(-1, W).mean(1)
            found = probe.score(means, windows.positive[held_out], windows.problems[held_out].tolist(), seed=seed)
            lines.append(
                {"role": role, "layer": sae.layer, "row": row, "cosine": float(ranked.cosine[row])}
                | {"keyword_logit": float(ranked.keyword_logit[row]), "auc_chosen": float(ranked.auc_chosen[row])}
                | {"auc": found.auc, "auc_low": found.low, "auc_high": found.high}
                | {"active": float(ranked.active[row])}
                | {f"place_{name}": int(places[name][row]) for name in keys}
                | {"n_windows": int(held_out.sum()), "n_problems": len(np.unique(windows.problems[held_out]))}
            )
    return lines


def effects_of(r: Results, role: str) -> dict[str, dict[str, float]]:
    """Condition -> problem -> change of the log-odds from the unsteered model in nats, mean over sets or rows."""
    own = [line for line in r.tables["sae_effects"] if line["role"] == role]
    plain = {line["problem_id"]: line["log_odds"] for line in own if line["condition"] == UNSTEERED}
    found: dict[str, dict[str, float]] = {}
    for condition in _ORDER:
        changes: dict[str, list[float]] = {}
        for line in own:
            if line["condition"] == condition:
                change = line["log_odds"] - plain[line["problem_id"]]
                changes.setdefault(line["problem_id"], []).append(change)
        means = {problem: float(np.mean(values)) for problem, values in changes.items()}
        found[condition] = {problem: value for problem, value in means.items() if math.isfinite(value)}
    return found


def paired(effects: dict[str, dict[str, float]], one: str, other: str) -> np.ndarray:
    """[problems, 2] changes under two conditions on the same texts."""
    both = [(value, effects[other][problem]) for problem, value in effects[one].items() if problem in effects[other]]
    return np.array(both).reshape(-1, 2)


def by_condition(r: Results) -> Plot | None:
    """Change of the log-odds under each condition, on each model."""
    shown: Table = []
    series = []
    for i, role in enumerate(r.roles):
        effects = effects_of(r, role)
        lines = []
        for place, condition in enumerate(_ORDER):
            changes = list(effects[condition].values())
            if len(changes) < 2:
                continue
            low, high = log_odds.interval(changes)
            line = {"role": role, "condition": condition, "effect": float(np.mean(changes)), "low": low, "high": high}
            lines.append((place, line | {"n_problems": len(changes)}))
        if lines:
            x = [place + 0.16 * (i - (len(r.roles) - 1) / 2) for place, _ in lines]
            y, low, high = ([line[name] for _, line in lines] for name in ("effect", "low", "high"))
            series.append(Series(f"{role} model", x, y, low, high, colour=COLOURS[i], style="", marker=MARKERS[i]))
            shown += [line for _, line in lines]
    if not series:
        return None
    q, first = r.experiment.questions.sae, r.tables["sae"][0]
    lengths = {line["role"]: line["length"] for line in r.tables["sae_effects"]}
    norms = " and ".join(f"{length:.3g} ({role} model)" for role, length in lengths.items())
    caption = (
        f"Change of the log-odds of wait or hmm where a sentence begins, on reasoning traces, one a problem: mean and "
        f"95 % interval over {extent(shown, 'n_problems')} problems (Student's t). Added to the output of layer "
        f"{first['layer']}, of norm {norms}: each model's own vector; the sum of the {q.top} rows "
        f"of the decoder nearest to it; sums of as many rows matched in keyword logit (mean over sets); single nearest "
        f"rows (mean over {q.singles}); what is left of the vector outside of the nearest rows, shorter. Ablated: the "
        "span of the nearest rows is removed from this layer on, and nothing is added."
    )
    panel = Panel("", "", log_odds.AXIS, series, categories=list(_ORDER), level=0.0)
    return Plot(
        "sae_effects", "Rows of a sparse autoencoder in place of the vector", caption, [[panel]], shown, place=7.6
    )


def rankings(r: Results) -> Plot | None:
    """The listed rows: cosine with the vector against what they spell, and against what they tell."""
    table = r.tables["sae_rows"]
    if not table:
        return None
    panels = []
    for column, label, level in (
        ("keyword_logit", "keyword logit of the row", None),
        ("auc", "ROC-AUC on held-out problems", 0.5),
    ):
        series = []
        for i, role in enumerate(r.roles):
            own = [line for line in table if line["role"] == role]
            x, y = ([line[name] for line in own] for name in ("cosine", column))
            series.append(Series(f"{role} model", x, y, colour=COLOURS[i], style="", marker=MARKERS[i]))
        panels.append(Panel("", "cosine with the vector", label, series, level=level))
    summary = {line["role"]: line for line in r.tables["sae"]}
    said = "; ".join(
        f"{role} model: largest |cosine| {line['largest_cosine']:.3f}, by chance {line['chance_cosine']:.3f}, "
        f"{100 * line['explained_variance']:.0f} % of the variance rebuilt by {line['active_features']:.3g} features"
        for role, line in summary.items()
    )
    first, listed = table[0], r.experiment.questions.sae.listed
    caption = (
        f"Rows of the decoder that are among the first {listed} by cosine with the model's own vector, by keyword "
        f"logit, or by how well the feature's activation in the window before a section tells {r.label} from other "
        f"labels, at layer {first['layer']}. The AUC is of the half of the problems ({first['n_problems']}) by "
        f"which no row was chosen. {said}."
    )
    return Plot("sae_rows", "Rows of a sparse autoencoder beside the vector", caption, [panels], table, place=7.7)
