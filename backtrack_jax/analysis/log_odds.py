"""Log-odds of a keyword where a sentence begins, on given text: the measure beside every rate.

Every condition reads the same texts in one forward pass each, and at the token before each sentence

    log-odds = log p(next token is a keyword) - log p(it is none)                                            [nats]

A rate of sampled replies cannot fall below zero hits, so that a model which never says "wait" hides any effect that is
too small to make it say so. Log-odds have no such floor and no sampling noise. The texts are the reasoning model's
traces and what the base model wrote, so that neither model is measured on the other's text alone.
"""

import dataclasses
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from backtrack_jax.analysis import cells, dose, logit_lens, replies, resumable, statistics
from backtrack_jax.analysis.base import Analysis, Material, Planned
from backtrack_jax.analysis.claims import Claim, all_of, measured, number
from backtrack_jax.analysis.forced import (
    BASE_REPLIES,
    REASONING_TRACES,
    Forced,
    by_position,
    edited_batches,
    given_text,
    logits_at_once,
    places_before,
    texts_of,
)
from backtrack_jax.analysis.plots import Panel, Plot, Series, line_of
from backtrack_jax.analysis.results import PAPER_LABEL, Results, extent
from backtrack_jax.analysis.statistics import Region
from backtrack_jax.config import Experiment
from backtrack_jax.data.problems import spread
from backtrack_jax.data.records import UNSTEERED, Annotation, Condition, Trace
from backtrack_jax.data.text import KEYWORDS, opening_end, sentence_spans
from backtrack_jax.files.tables import Table
from backtrack_jax.intervention import Intervention
from backtrack_jax.models.batching import bucket, check_ids
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.sharding import place_rows

AXIS = "change of the log-odds, nats"

SILENT = 0.25
"""What the base model's change must stay below, in units of the reasoning model's."""

EXAMPLES = "examples"
"""Condition of the positive control: unsteered, after examples of the label."""


class LogOdds(Analysis):
    """Of the keywords of Eq. 1, under every condition of the sweep."""

    name = "log_odds"
    settings = ("analysis.forced_texts", "analysis.forced_sentences", "analysis.examples")
    role_tables = ("log_odds",)

    def scratch(self, role: str) -> list[str]:
        """Finished rows, appended batch by batch."""
        return [f"{role}.log_odds.jsonl"]

    def of_role(self, material: Material, role: str, folder: Path) -> dict[str, Table]:
        """One forward pass for every text under every condition."""
        lines, rows = forced_rows(material, role)
        found = resumed(material, role, rows, folder / self.scratch(role)[0], f"log-odds of the {role} model")
        return {"log_odds": [line | {"log_odds": value} for line, value in zip(lines, found, strict=True)]}

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """Beside Fig. 3."""
        return [by_magnitude(r)]

    def sentences(self, r: Results) -> Sequence[str]:
        """What the vectors add on either model, on the reasoning traces."""
        chosen = dose.of_run(r)
        if not chosen or len(r.roles) < 2:
            return []
        texts = []
        for source in r.roles:
            both = paired_effects(r, REASONING_TRACES, source, chosen.cell["magnitude"])
            if len(both) < 2:
                return []
            (base, reasoning), (low, high) = both.mean(0), interval(both[:, 1] - both[:, 0])
            texts.append(
                f"the {source}-derived vector adds {reasoning:.2f} nats to the log-odds of wait or hmm on the "
                f"reasoning model and {base:.2f} on the base model (difference {reasoning - base:.2f}, {low:.2f} to "
                f"{high:.2f})"
            )
        return [f"On given text, at magnitude {chosen.cell['magnitude']:g}, {'; '.join(texts)}."]

    def claims(self, r: Results) -> Sequence[Claim]:
        """Whether the base model stays as it is."""
        return [claim for claim in [_base_silent(r)] if claim]

    def plan(self, planned: Planned) -> str:
        """Texts under all conditions."""
        e = planned.experiment
        n = 2 * min(e.analysis.forced_texts, len(planned.trace_tokens)) * planned.conditions
        return f"log-odds after at most {n:,} texts, each under a condition" if n else ""

    def memory(self, planned: Planned, config: ModelConfig) -> dict[str, int]:
        """The logits of some positions of a batch."""
        e = planned.experiment
        n = logits_at_once(e.analysis.batch_size, config.vocab_size) if e.analysis.forced_texts else 0
        return {"logits after given texts": 4 * n // (e.data_parallel * e.model_parallel)}


LOG_ODDS = LogOdds()


def resumed(
    material: Material, role: str, rows: Sequence[Forced], partial: Path, title: str, temperature: float = 1.0
) -> list[float]:
    """`keyword_log_odds` of the keywords of Eq. 1, measured or taken from what an earlier run has left.

    Args:
      material: what there is to read.
      role: of the model that reads.
      rows: texts with the row of an intervention each.
      partial: file of the rows that are done.
      title: of the progress.
      temperature: at which the next token would be drawn.

    Returns:
      Nats, one value a row.
    """
    return resumable.values(
        partial,
        "log_odds",
        f"  {title}",
        [len(row.ids) for row in rows],
        lambda done: keyword_log_odds(
            material.model(role),
            rows,
            logit_lens.word_ids(material.tokenizer, KEYWORDS),
            batch_size=material.experiment.analysis.batch_size,
            done=done,
            temperature=temperature,
        ),
    )


def keyword_log_odds(
    model: Decoder,
    rows: Sequence[Forced],
    keyword_ids: Container[int],
    *,
    batch_size: int,
    done: Container[int] = (),
    temperature: float = 1.0,
) -> Iterator[list[tuple[int, float]]]:
    """Mean log-odds of keywords at the sentence starts of texts.

    Args:
      model: the model, without any intervention of its own.
      rows: texts with the row of an intervention each.
      keyword_ids: ids of the tokens that are a keyword.
      batch_size: rows of a batch; rows of similar length share one.
      done: row numbers; batches of which all rows are in it are left out.
      temperature: at which the next token would be drawn, > 0.

    Yields:
      After every batch, (row number, mean over its sentence starts, in nats); nan for a row without any.

    Raises:
      ValueError: names the row with a token that the model does not know, or a start that no token stands before.
      FloatingPointError: names the row whose logits are not finite.
    """
    for i, row in enumerate(rows):
        check_ids(row.ids, model.config.vocab_size, f"row {i}")
        if not all(0 < start <= len(row.ids) for start in row.starts):
            raise ValueError(f"row {i} has the starts {list(row.starts)}, expected 1 to {len(row.ids)}")
    keyword = jnp.asarray([i in keyword_ids for i in range(model.config.vocab_size)])
    width = bucket(max((len(row.starts) for row in rows), default=1))
    texts = ([row.ids for row in rows], [row.prompt_length for row in rows], [[row.intervention] for row in rows])
    for batch in edited_batches(*texts, batch_size, done):
        at, counted = places_before([rows[row].starts for row in batch.filled], width)
        placed = place_rows(model, (batch.ids, batch.positions, at, counted, *batch.edits))
        n = len(batch.members)
        sums = np.asarray(_sums(model, keyword, *placed, np.float32(temperature)), np.float64)[:n]
        if bad := [row for row, value in zip(batch.members, sums, strict=True) if not math.isfinite(value)]:
            raise FloatingPointError(f"logits of row {bad[0]} are not finite")
        n_starts = np.array([len(rows[row].starts) for row in batch.members])
        means = np.divide(sums, n_starts, out=np.full(n, np.nan), where=n_starts > 0)
        yield list(zip(batch.members, means.tolist(), strict=True))


@jax.jit
def _sums(
    model: Decoder,
    keyword: jax.Array,  # [V] bool
    ids: jax.Array,  # [B, T]
    positions: jax.Array,  # [B, T]
    at: jax.Array,  # [B, P] positions of the tokens before the starts
    counted: jax.Array,  # [B, P] bool
    intervention: Intervention,
    temperature: jax.Array,
) -> jax.Array:
    """Sum of the log-odds of a keyword after the counted positions, [B] float32."""
    resid = model(ids, positions, intervention=intervention).resid
    x = jnp.take_along_axis(resid, at[..., None], axis=1)

    def of_position(x: jax.Array) -> jax.Array:
        logits = model.logits(x) / temperature
        yes, no = (jax.nn.logsumexp(logits, axis=-1, where=where) for where in (keyword, ~keyword))
        return yes - no

    found = by_position(of_position, x, model.config.vocab_size)
    return jnp.sum(jnp.where(counted, found, 0.0), axis=1)


def forced_rows(material: Material, role: str) -> tuple[Table, list[Forced]]:
    """What a model reads: texts under every condition, as many as it has problems, and the positive control.

    Returns:
      A line per row: the condition, `text`, `problem_id` and `n_starts`; and the rows, in the same order.
    """
    problems: dict[Condition, set[str]] = {}
    for reply in material.replies:
        if reply.condition.target == role:
            problems.setdefault(reply.condition, set()).add(reply.problem_id)
    lines: Table = []
    rows: list[Forced] = []

    def add(trace: Trace, source: str, spans: Sequence[tuple[int, int]], under: Mapping[Condition, str]) -> None:
        """A text with the sentences that count, under conditions, whose kinds are named anew."""
        ids, prompt_length, starts = given_text(material, role, trace, spans)
        for condition, kind in under.items():
            row = material.intervention(condition, trace.problem_id)
            rows.append(Forced(ids, prompt_length, starts, row))
            line = dataclasses.asdict(condition) | {"kind": kind, "text": source, "problem_id": trace.problem_id}
            lines.append(line | {"n_starts": len(starts)})

    pairs = material.pairs
    for source, texts in texts_of(material).items():
        read_by = {c: {trace.id for trace in spread(texts, len(ids))} for c, ids in problems.items()}
        for trace in texts:
            spans = sentence_spans(trace)[1:]  # a prompt stands before the first, not text
            under = {c: c.kind for c, read in read_by.items() if trace.id in read}
            add(trace, source, spans, under)
            plain = dict.fromkeys((c for c in under if c.kind == UNSTEERED), EXAMPLES)
            if plain and (shown := _examples(material.experiment, pairs, trace.problem_id)):
                begin = opening_end(trace.text)
                longer = f"{trace.text[:begin]}{shown} {trace.text[begin:]}"
                moved = [(start + len(shown) + 1, stop + len(shown) + 1) for start, stop in spans]
                add(dataclasses.replace(trace, text=longer, token_ids=None), source, moved, plain)
    return lines, rows


def _examples(e: Experiment, pairs: Sequence[tuple[Trace, Annotation]], problem: str) -> str:
    """Sections of the experiment's label out of traces of other problems, each after the sentence before it."""
    found = []
    for trace, annotation in pairs:
        if trace.problem_id == problem:
            continue
        for before, section in zip(annotation.sections, annotation.sections[1:], strict=False):
            if section.label == e.vectors.label and before.label != e.vectors.label:
                found.append(trace.text[before.start : section.stop])
                break  # one a trace
    return " ".join(spread(found, e.analysis.examples)) if e.analysis.examples and found else ""


def effects(r: Results, target: str, text: str, **condition: object) -> dict[str, float]:
    """Problem -> log-odds under a condition less those of the unsteered model on the same text, in nats.

    Args:
      r: the run.
      target: role of the model that reads.
      text: `REASONING_TRACES` or `BASE_REPLIES`.
      **condition: other fields of the condition, as in the table.
    """
    return changes(r.tables["log_odds"], target, text, **condition)


def changes(lines: Table, target: str, text: str, **condition: object) -> dict[str, float]:
    """`effects` out of the lines of log_odds.csv."""
    own = [line for line in lines if (line["target"], line["text"]) == (target, text)]
    plain = {line["problem_id"]: line["log_odds"] for line in own if line["kind"] == UNSTEERED}
    changed = {
        line["problem_id"]: line["log_odds"] - plain.get(line["problem_id"], math.nan)
        for line in own
        if all(line[name] == value for name, value in condition.items())
    }
    return {problem: change for problem, change in changed.items() if math.isfinite(change)}


def by_magnitude(r: Results) -> Plot | None:
    """Change of the log-odds against magnitude: vectors of either model, and controls, on each model and text."""
    found = [line for line in r.tables["log_odds"] if line["kind"] != UNSTEERED and line["layer"] == r.layer]
    kinds = [(r.label, source, f"{source}-derived vector") for source in r.roles]
    asked = set(r.experiment.steering.all_kinds)  # what questions ask for has figures of its own
    without_source = {line["kind"] for line in found if not line["source"]} & asked
    kinds += [(kind, "", kind) for kind in sorted(without_source)]
    shown: Table = []
    panels = []
    for text in (REASONING_TRACES, BASE_REPLIES):
        row = []
        for target in r.roles:
            own = [line for line in found if (line["target"], line["text"]) == (target, text)]
            series = []
            for i, (kind, source, name) in enumerate(kinds):
                cell = {"kind": kind, "source": source, "layer": r.layer, "window": r.window if source else ""}
                points = [{"magnitude": 0.0, "effect": 0.0, "low": 0.0, "high": 0.0}]
                magnitudes = {line["magnitude"] for line in own if line["kind"] == kind}
                for magnitude in sorted(magnitudes):
                    changes = list(effects(r, target, text, magnitude=magnitude, **cell).values())
                    if not changes:
                        continue
                    low, high = interval(changes)
                    point = {"magnitude": magnitude, "effect": float(np.mean(changes)), "low": low, "high": high}
                    points.append(point)
                    shown.append({"target": target, "text": text, **cell, **point, "n_problems": len(changes)})
                if len(points) > 1:
                    points.sort(key=lambda point: point["magnitude"])
                    x, y, low, high = ([p[column] for p in points] for column in ("magnitude", "effect", "low", "high"))
                    series.append(Series(name, x, y, low, high, **line_of(i, source)))
            if series:
                row.append(Panel(f"{target} model on {text}", cells.unit_label(r, target), AXIS, series, level=0.0))
        if row:
            panels.append(row)
    if not shown:
        return None
    problems = extent(shown, "n_problems")
    caption = (
        "Change of the log-odds of wait or hmm where a sentence begins, from the unsteered model on the same text: "
        f"mean and 95 % interval over {problems} problems (Student's t); {cells.setting(r)}. Texts are given, not "
        "sampled: there is no floor that could hide an effect."
    )
    return Plot("log_odds", "Log-odds on given text", caption, panels, shown, place=3.1)


def _base_silent(r: Results) -> Claim | None:
    """By the worse of both vectors, on the worse of both texts."""
    chosen, plain = dose.of_run(r), r.unsteered("base") if "base" in r.roles else None
    if r.label != PAPER_LABEL or not chosen or not plain or len(r.roles) < 2 or not r.tables["log_odds"]:
        return None
    region, magnitude = Region(high=SILENT), chosen.cell["magnitude"]
    of_cell = replies.by_cell(r.tables["replies"])
    tried, verdicts, notes = [], [], []
    for text in (REASONING_TRACES, BASE_REPLIES):
        for source in r.roles:
            both = paired_effects(r, text, source, magnitude)
            if len(both) < 2:
                continue
            ends = statistics.mean_ratio_interval(both[:, 0], both[:, 1], level=dose.LEVEL)
            verdicts.append(statistics.verdict(*ends, region, len(both)))
            base, reasoning = both.mean(0)
            tried.append((ends[1], base / reasoning, ends, len(both)))
            notes.append(f"{source}-derived on {text} {base:.2f} of {reasoning:.2f} nats")
        control = np.array(list(effects(r, "base", text, kind=EXAMPLES).values()))
        ends = interval(control, dose.LEVEL)
        verdicts.append("holds" if ends[0] > 0 else "undecided")
        seen = f"{control.mean():.2f} ({number(ends[0])} to {number(ends[1])}) nats" if len(control) else "not measured"
        notes.append(f"positive control, examples of {r.label} first, on {text}: {seen}")
    steered = next((c for c in r.cells("base", r.label, r.roles[0]) if c["magnitude"] == magnitude), None)
    if not tried or steered is None:
        return None
    coherence = dose.coherence(of_cell, steered, plain)
    verdicts.append("holds" if coherence.low >= dose.COHERENT else "undecided")
    notes.append(f"coherence of its replies {coherence}")
    _, estimate, ends, n = max(tried)
    return measured(
        "base_silent",
        "The vectors act on the reasoning model and not on the base model.",
        figure="log_odds",
        where="Fig. 3",
        rule=f"change of the log-odds on the base model over that on the reasoning model below {SILENT:g} with either "
        f"vector on either text, the base model's replies coherent, its log-odds raised by examples, {dose.RULE}",
        estimate=float(estimate),
        interval=ends,
        unit="of the reasoning model's change",
        region=region,
        n=n,
        note="; ".join(notes),
        given=all_of(verdicts),
    )


def interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of one value a problem."""
    return statistics.mean_interval(np.asarray(values), np.ones(np.shape(values)), level=level)


def paired_effects(r: Results, text: str, source: str, magnitude: float) -> np.ndarray:
    """[problems, 2] changes of the log-odds in the base and the reasoning model on the same texts, in nats."""
    cell = {"kind": r.label, "source": source, "layer": r.layer, "window": r.window, "magnitude": magnitude}
    base, reasoning = (effects(r, target, text, **cell) for target in ("base", "reasoning"))
    return np.array([(base[name], reasoning[name]) for name in base if name in reasoning]).reshape(-1, 2)
