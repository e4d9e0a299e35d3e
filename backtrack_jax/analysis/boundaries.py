"""Boundaries of traces, continued once more from the same prefix: which recur, and how they are sorted.

A boundary is the place right before a section. Its prefix is the token ids of prompt and reply up to there, as the
model read them: text is never tokenised again.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from backtrack_jax import generate
from backtrack_jax.analysis import beta_binomial, log_odds, resumable
from backtrack_jax.analysis.backtracking import count_keywords
from backtrack_jax.analysis.base import Material
from backtrack_jax.analysis.forced import Forced
from backtrack_jax.data.problems import spread
from backtrack_jax.data.records import Annotation, Trace, failure
from backtrack_jax.data.text import reasoning_end, split_sentences
from backtrack_jax.files.tables import Table
from backtrack_jax.intervention import no_intervention

LABELLED, REFERENCE = "labelled", "reference"
"""Groups of boundaries: before sections of `vectors.label`, and before others."""

THIRDS = ("first third", "second third", "last third")
"""Of a reply, by the place of the boundary."""

N_PARTS = 5
"""Into how many parts boundaries are sorted."""


@dataclasses.dataclass(frozen=True)
class Boundary:
    """The place before a section.

    Attributes:
      trace: where it is.
      label: of the section.
      prefix: token ids of prompt and reply up to right before the section's first token, as the model reads them.
      reply_start: index of the reply's first token.
      position: place in the reply, from 0 to 1.
      row: of the section, in the model's window sums.
    """

    trace: Trace
    label: str
    prefix: Sequence[int]
    reply_start: int
    position: float
    row: int

    @property
    def third(self) -> int:
        """Third of the reply, 0 to 2."""
        return min(2, int(3 * self.position))


def choose(material: Material, role: str) -> list[Boundary]:
    """Boundaries whose window was read: of the experiment's label, and as many of other labels.

    They are spread over problems: every problem has one, drawn at random, before any has a second.

    Raises:
      ValueError: there is no such section of the label.
    """
    e, sums = material.experiment, material.sums[role]
    found = [place for trace, annotation in material.pairs for place in _of_trace(material, role, trace, annotation)]
    found = [place for place in found if sums.section_positions[place.row] > 0]
    own = [place for place in found if place.label == e.vectors.label]
    if not own:
        raise ValueError(f"no window of a section of vectors.label={e.vectors.label!r} was read, so nothing recurs")
    rng = np.random.default_rng(e.seed)
    chosen = _spread_over_problems(own, e.questions.stability.boundaries or len(own), rng)
    others = [place for place in found if place.label != e.vectors.label]
    return chosen + _spread_over_problems(others, len(chosen), rng)


def _of_trace(material: Material, role: str, trace: Trace, annotation: Annotation) -> Iterator[Boundary]:
    """All sections of a trace; in the window sums, those with a drawn label as well come after them."""
    read, sums = material.token_trace(role, trace, annotation), material.sums[role]
    first = np.flatnonzero(sums.section_traces == sums.trace_ids.index(trace.id))[:1]
    for number, (label, start) in enumerate(read.starts):
        row = int(first[0]) + number
        kept = (sums.plan.labels[sums.section_labels[row]], int(sums.section_starts[row]))
        if kept != (label, start):
            raise ValueError(f"section {number} of trace {trace.id!r} is {(label, start)}, but {kept} in the sums")
        position = (start - read.reply_start) / (len(read.ids) - read.reply_start)
        yield Boundary(trace, label, read.ids[:start], read.reply_start, position, row)


def _spread_over_problems(places: Sequence[Boundary], limit: int, rng: np.random.Generator) -> list[Boundary]:
    """At most `limit` places: of every problem one at random, then of those that have more a second, and so on."""
    rounds: dict[int, list[int]] = defaultdict(list)
    taken: dict[str, int] = defaultdict(int)
    for number in rng.permutation(len(places)).tolist():
        problem = places[number].trace.problem_id
        rounds[taken[problem]].append(number)
        taken[problem] += 1
    chosen: list[int] = []
    for _, members in sorted(rounds.items()):
        if len(chosen) < limit:
            chosen += spread(sorted(members), limit - len(chosen))
    return [places[number] for number in sorted(chosen)]


def continuations(material: Material, role: str, found: Sequence[Boundary], partial: Path) -> list[dict[str, Any]]:
    """`ids` and `finish_reason` of every continuation, those of a boundary after each other."""
    e, q = material.experiment, material.experiment.questions.stability
    _, n_layers, _, _, d_model = material.sums[role].sums.shape
    nothing = no_intervention(n_layers, d_model)
    rows = []
    for place in found:
        name = f"{place.trace.id}@{len(place.prefix)}"
        keys = [generate.row_key(e.seed, name, draw) for draw in range(q.draws)]
        rows += [generate.Row(place.prefix, key, nothing, f"boundary {name}, draw {i}") for i, key in enumerate(keys)]

    def measure(done: Container[int]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        batches = generate.generate_rows(
            material.model(role),
            rows,
            sampling=generate.Sampling(e.traces.temperature, e.traces.top_p),
            stop_ids=material.tokenizer.stop_ids,
            vocab_size=material.tokenizer.vocab_size,
            max_new_tokens=q.tokens,
            batch_size=e.steering.batch_size,
            done=done,
            repeats=q.draws,
        )
        for batch in batches:
            yield [(row, dataclasses.asdict(reply)) for row, reply in batch]

    return resumable.lines(partial, f"  continuations by the {role} model", [q.tokens] * len(rows), measure)


def next_token(material: Material, role: str, found: Sequence[Boundary], partial: Path) -> list[float]:
    """Log-odds that the next token is a keyword, at the temperature of the traces and without top-p, in nats."""
    e = material.experiment
    _, n_layers, _, _, d_model = material.sums[role].sums.shape
    nothing = no_intervention(n_layers, d_model)
    rows = [Forced(place.prefix, place.reply_start, (len(place.prefix),), nothing) for place in found]
    return log_odds.resumed(material, role, rows, partial, f"next tokens of the {role} model", e.traces.temperature)


def sort(
    material: Material, role: str, found: Sequence[Boundary], draws: Sequence[Mapping[str, Any]], odds: Sequence[float]
) -> Table:
    """The table of boundaries, with the shares of both halves of the draws and the fifths that the first one gives."""
    e, q = material.experiment, material.experiment.questions.stability
    keyword, judged, complete = hits(material, found, draws)  # [n, draws]
    primary = keyword if material.judge is None else judged
    halves = np.split(primary, 2, axis=1)
    whole = _counted(primary)
    columns = {name: _counted(half) for name, half in zip(("sort", "score"), halves, strict=True)}
    labelled = np.array([place.label == e.vectors.label for place in found])
    shrunk = np.full(len(found), math.nan)
    for group in (labelled, ~labelled):
        k, n = (of[group] for of in whole)
        if n.any():
            shrunk[group] = beta_binomial.fit(k, n).shrunk(k, n)
    chance = special.expit(np.asarray(odds, np.float64))
    ties = chance
    if q.filter_by == "question":
        of = [f"{place.trace.problem_id} {is_own}" for place, is_own in zip(found, labelled, strict=True)]
        columns = {name: (_over_group(k, of), _over_group(n, of)) for name, (k, n) in columns.items()}
        shrunk, ties = (_over_group(x, of) / _over_group(np.ones(len(of)), of) for x in (shrunk, chance))
    fifths = np.zeros(len(found), int)
    if labelled.sum() >= N_PARTS:
        k, n = columns["sort"]
        fifths[labelled] = sorted_parts(k[labelled], n[labelled], ties[labelled])
    lines: Table = []
    for i, place in enumerate(found):
        line = {
            "role": role,
            "group": LABELLED if labelled[i] else REFERENCE,
            "problem_id": place.trace.problem_id,
            "trace_id": place.trace.id,
            "category": place.trace.category,
            "label": place.label,
            "token": len(place.prefix) - place.reply_start,
            "position": place.position,
            "third": THIRDS[place.third],
            "section": place.row,
            "draws": q.draws,
            "keyword_hits": int(keyword[i].sum()),
            "judge_hits": int(np.nansum(judged[i])),
            "judged": int(np.isfinite(judged[i]).sum()),
            "complete": int(complete[i].sum()),
            "next_token": float(chance[i]),
        }
        line |= {"hits": int(whole[0][i]), "counted": int(whole[1][i])}
        for name, (k, n) in columns.items():
            line |= {f"{name}_hits": int(k[i]), f"{name}_draws": int(n[i])}
        lines.append(line | {"shrunk": float(shrunk[i]), "fifth": int(fifths[i])})
    return lines


def _counted(hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hits and draws that were labelled of each boundary, of [n, draws]."""
    return np.nansum(hits, axis=1), np.sum(np.isfinite(hits), axis=1)


def hits(
    material: Material, found: Sequence[Boundary], draws: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether the first sentence of each continuation backtracks, by the keywords and by the judge, and has its end.

    Returns:
      [n, draws] float64 each; by the judge NaN where there is none, or it gave no label. A continuation without a
      sentence, where the reasoning ends at the boundary, does not backtrack.
    """
    n = len(draws) // len(found)
    keyword, complete = np.zeros((2, len(found), n))
    judged = np.full((len(found), n), math.nan)
    stop_ids = set(material.tokenizer.stop_ids)
    asked: dict[tuple[int, str], tuple[Trace, int]] = {}  # one text is judged once, however often it was drawn
    members: list[tuple[int, int, tuple[int, str]]] = []
    for i, place in enumerate(found):
        before = material.tokenizer.decode(place.prefix[place.reply_start :])
        for draw, line in enumerate(draws[i * n : (i + 1) * n]):
            text = material.tokenizer.decode([token for token in line["ids"] if token not in stop_ids])
            end = reasoning_end(text, place.trace.end_marks)
            spans = split_sentences(text[:end])
            complete[i, draw] = len(spans) > 1 or end < len(text) or line["finish_reason"] == "stop"
            if not spans:
                judged[i, draw] = 0.0
                continue
            start, stop = spans[0]
            keyword[i, draw] = count_keywords(text[start:stop]).hits > 0
            key = (i, text[:stop])
            name, whole = f"{place.trace.id}@{len(place.prefix)}/{draw}", before + text[:stop]
            shown = dataclasses.replace(place.trace, id=name, text=whole, token_ids=None, finish_reason=None)
            asked.setdefault(key, (shown, len(before) + start))
            members.append((i, draw, key))
    if material.judge is None:
        return keyword, np.full_like(judged, math.nan), complete
    label = material.experiment.vectors.label
    answers = material.judge([trace for trace, _ in asked.values()]) if asked else []
    found_at = {
        key: _backtracks(annotation, at, label)
        for (key, (_, at)), annotation in zip(asked.items(), answers, strict=True)
    }
    for i, draw, key in members:
        judged[i, draw] = found_at[key]
    return keyword, judged, complete


def _backtracks(annotation: Annotation, at: int, label: str) -> float:
    """1 if the section at a character has the label, 0 if it has another, NaN if there is none."""
    if failure(annotation) is not None:
        return math.nan
    section = next((section for section in annotation.sections if section.start <= at < section.stop), None)
    return math.nan if section is None else float(section.label == label)


def sorted_parts(hits: np.ndarray, draws: np.ndarray, ties: np.ndarray, n_parts: int = N_PARTS) -> np.ndarray:
    """Equal parts by rising share of hits, and by `ties` where it is equal: [n] int, from 1 to `n_parts`."""
    share = np.divide(hits, draws, out=np.zeros(len(hits)), where=np.asarray(draws) > 0)
    rank = np.empty(len(share), int)
    rank[np.lexsort((ties, share))] = np.arange(len(share))
    return 1 + rank * n_parts // len(share)


def _over_group(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """In place of each value, the sum over its group."""
    _, at = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(at, values)[at]
