"""The rows of the question of noise: which text is read under which noise, with which draw."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from backtrack_jax import generate, intervention, subspaces
from backtrack_jax.analysis import logit_lens, noise_forced, resumable
from backtrack_jax.analysis.base import Material
from backtrack_jax.analysis.forced import REASONING_TRACES, Forced, given_text, texts_of
from backtrack_jax.config import Experiment
from backtrack_jax.data.problems import spread
from backtrack_jax.data.records import UNSTEERED, Condition, Trace, window_name
from backtrack_jax.data.text import KEYWORDS, sentence_spans
from backtrack_jax.files.tables import Table
from backtrack_jax.intervention import Intervention
from backtrack_jax.kinds import parse

NOISE = "noise"
TRACES, CLEAN_REPLIES, NOISED_REPLIES = "traces", "replies without noise", "replies under noise"
"""Where texts come from."""

COVARIANCE = "matched-noise:covariance"
PROMPT = "noise during prompt"
_MOST_COMPONENTS = 256  # of a covariance: a row holds them once for every layer


@dataclasses.dataclass(frozen=True)
class Read:
    """A text that is read under noise.

    Attributes:
      kind: what is added, as tables call it.
      text: where the text comes from.
      draw: number of the draw of the noise, or of the direction that is frozen for the run.
      problem: id of the text's problem.
      forced: the text, with the row of the intervention.
    """

    kind: str
    text: str
    draw: int
    problem: str
    forced: Forced


def magnitude(e: Experiment) -> float:
    """The magnitude of the setting, or the largest one at which baselines are added."""
    given = e.steering.baseline_magnitudes or e.steering.magnitudes
    return e.questions.noise.magnitude or max(given)


def burst(e: Experiment) -> str:
    """The entry of the burst of noise."""
    return f"noise during generated[0:{e.questions.noise.burst}]"


def primary(label: str) -> str:
    """The primary contrast."""
    return f"noise-outside:{label} less noise-outside:random"


def span_rank(material: Material, role: str) -> int:
    """How many of the labels' vectors, in the order of `labels(r)`, have a part of their own.

    Differences from the mean of all sections sum to about 0, so that the last of them often has none.
    """
    found = {label: vector for (of, label), vector in material.vectors.items() if of == role}
    names = [material.experiment.vectors.label, *sorted(set(found) - {material.experiment.vectors.label})]
    units = np.stack([found[name].unit(material.experiment.steering.main_layer) for name in names])
    left = np.abs(np.diag(np.linalg.qr(units.astype(np.float64).T)[1]))
    return int(np.argmax(left < 0.05)) if np.any(left < 0.05) else len(left)


class Rows:
    """Builds the interventions of a role's model; what does not depend on the problem is built once."""

    def __init__(self, material: Material, role: str):
        """Of the model of a role.

        Raises:
          ValueError: a rank of `questions.noise.ranks` is larger than there are principal components.
        """
        self.material, self.role = material, role
        e = self.e = material.experiment
        self.layer, self.label = e.steering.main_layer, e.vectors.label
        self.vector = material.vectors[role, self.label]
        self.n_layers, self.d_model = self.vector.directions.shape
        self.length = material.length(role, self.layer, magnitude(e))
        self.rank = span_rank(material, role)
        sums = material.sums[role]
        states = sums.section_means[sums.members("all"), sums.plan.layers.index(self.layer)]
        components, variances = subspaces.principal_components(states)
        self.covariance = components * np.sqrt(variances)[:, None]
        if (most := max(e.questions.noise.ranks, default=0)) > len(self.covariance):
            raise ValueError(
                f"questions.noise.ranks={e.questions.noise.ranks}, but the {role} model's {len(states)} "
                f"windows have {len(self.covariance)} principal components; expected at most as many, not {most}"
            )
        shape: dict[str, Any] = {"n_layers": self.n_layers, "span": e.steering.span}
        factor = jnp.asarray(self.covariance[:_MOST_COMPONENTS], jnp.float32)
        self._matched = intervention.matched_noise(factor, self.layer, self.length, **shape)

    def row(self, kind: str, problem: str, draw: int = 0) -> Intervention:
        """The row of an entry of `steering.kinds`, for a draw of a problem's noise; draw 0 is that of its reply."""
        key = generate.noise_key(generate.row_key(self.e.seed, problem, draw))
        if kind == COVARIANCE:
            return dataclasses.replace(self._matched, key=key)
        if kind == UNSTEERED:
            nothing = Condition(self.role, UNSTEERED, "", self.layer, "", 0.0, 0.0)
            return self.material.intervention(nothing, problem)
        source = self.role if parse(kind).read else ""
        window = window_name(self.e.vectors.window) if source else ""
        condition = Condition(self.role, kind, source, self.layer, window, magnitude(self.e), self.length)
        return dataclasses.replace(self.material.intervention(condition, problem), key=key)

    def kinds(self, number: int) -> list[tuple[str, str, int]]:
        """(name, entry of the language, draws) of what the text of the `number`-th problem is read under.

        A random direction is another one for every problem, and so is the random space beside the span of the labels;
        larger spaces are `questions.noise.seeds` different ones, since each is held.
        """
        q, label, rank = self.e.questions.noise, self.label, self.rank
        own, shared = number + 1, 1 + number % q.seeds
        found = [
            (NOISE, NOISE, q.draws),
            (f"noise-outside:{label}", f"noise-outside:{label}", q.draws),
            ("noise-outside:random", "noise-outside:random", q.draws),
            ("noise-outside:labels", f"noise-outside:labels({rank})", 1),
            ("noise-outside:subspace", f"noise-outside:subspace({rank}, {own})", 1),
            ("noise-within:labels", f"noise-within:labels({rank})", 1),
            ("noise-within:subspace", f"noise-within:subspace({rank}, {own})", 1),
            (f"noise-part-within:{label}", f"noise-part-within:{label}", 1),
            (COVARIANCE, COVARIANCE, 1),
            ("noise keeping norm", "noise keeping norm", 1),
            ("frozen-noise", "frozen-noise", 1),
            (label, label, 1),
        ]
        for k in q.ranks:
            found += [(f"noise-within:{name}({k})", f"noise-within:{name}({k})", 1) for name in ("pcs", "last-pcs")]
            found.append((f"noise-within:subspace({k})", f"noise-within:subspace({k}, {shared})", 1))
        return found

    def forced(self, trace: Trace) -> tuple[Any, int, list[int]] | None:
        """The first fields of `Forced` for a text; None for one without a sentence that counts."""
        given = given_text(self.material, self.role, trace, sentence_spans(trace)[1:])
        return given if given[2] else None

    def reads(self) -> list[Read]:
        """Every text under every row: the traces and, of the model that writes them, replies without noise and with."""
        q, found = self.e.questions.noise, []
        for number, trace in enumerate(texts_of(self.material)[REASONING_TRACES]):
            if (given := self.forced(trace)) is None:
                continue
            own = [(UNSTEERED, UNSTEERED, 0)]
            own += [(name, kind, draw) for name, kind, draws in self.kinds(number) for draw in range(draws)]
            own += [("fixed", f"fixed({seed})", seed) for seed in range(1, q.seeds + 1)]
            for name, kind, draw in own:
                row = self.row(kind, trace.problem_id, draw)
                found.append(Read(name, TRACES, draw, trace.problem_id, Forced(*given, row)))
        if self.role == self.e.author:
            for text, kind in ((CLEAN_REPLIES, UNSTEERED), (NOISED_REPLIES, NOISE)):
                for trace in self._replies(kind):
                    if (given := self.forced(trace)) is not None:
                        for name in (UNSTEERED, NOISE):
                            row = self.row(name, trace.problem_id)
                            found.append(Read(name, text, 0, trace.problem_id, Forced(*given, row)))
        return found

    def _replies(self, kind: str) -> list[Trace]:
        """The first reply to each problem under a condition; a reply in which BOS was sampled is no text."""
        if not self.e.questions.noise.replies:
            return []
        written = {
            reply.problem_id: reply.trace(end_marks=self.e.traces.end_marks)
            for reply in reversed(self.material.replies)
            if (reply.condition.target, reply.condition.kind) == (self.role, kind)
            if kind == UNSTEERED or reply.condition.magnitude == magnitude(self.e)
            if self.material.tokenizer.bos_id not in reply.ids
        }
        return spread(list(reversed(written.values())), self.e.analysis.forced_texts)


def measured(rows: Rows, reads: Sequence[Read], partial: Path) -> list[dict[str, Any]]:
    """What `noise_forced.measure` finds of each."""
    e, material = rows.e, rows.material
    units = np.stack([rows.vector.unit(layer) for layer in range(rows.n_layers)])
    return resumable.lines(
        partial,
        f"  texts under noise of the {rows.role} model",
        [len(read.forced.ids) for read in reads],
        lambda done: noise_forced.measure(
            material.model(rows.role),
            [read.forced for read in reads],
            logit_lens.word_ids(material.tokenizer, KEYWORDS),
            units,
            layer=rows.layer,
            window=e.vectors.window,
            batch_size=e.analysis.batch_size,
            done=done,
        ),
    )


VECTOR, RANDOM = "vector", "random direction"
"""Along what components are exchanged."""

INSERTED, REMOVED, ABLATED_CLEAN, ABLATED = "inserted", "removed", "ablated without", "ablated"
"""Runs whose components at later layers are set: those of the run with noise in the run without, the reverse, and both
runs without the components."""


def mediation(rows: Rows, reads: Sequence[Read], partial: Path) -> Table:
    """Log-odds of runs whose components at the later layers are those of another run, one line each.

    What is added is noise, with each of its draws, and the vector itself, of which the mediator is known. A random
    direction is another one for every problem and layer, without a part along the vector.
    """
    found: list[dict[str, Any]] = []
    exchanged: list[noise_forced.Exchanged] = []
    later = np.arange(rows.n_layers) > rows.layer
    units = np.stack([rows.vector.unit(layer) for layer in range(rows.n_layers)]).astype(np.float64)
    clean = {read.problem: read.forced for read in reads if (read.kind, read.text) == (UNSTEERED, TRACES)}
    numbers = {problem: number for number, problem in enumerate(clean)}
    for read in reads:
        if read.text != TRACES or read.kind not in (NOISE, rows.label):
            continue
        plain, added = clean[read.problem], read.forced
        rng = np.random.default_rng([rows.e.seed, numbers[read.problem], 3])
        e = rng.standard_normal(units.shape)
        e -= np.sum(e * units, axis=1, keepdims=True) * units
        of = {VECTOR: units, RANDOM: e / np.linalg.norm(e, axis=1, keepdims=True)}
        for along, directed in of.items():
            at = directed * later[:, None]
            runs = {
                INSERTED: noise_forced.Exchanged(plain, added.intervention, at),
                REMOVED: noise_forced.Exchanged(added, plain.intervention, at),
            }
            if along == VECTOR:
                runs[ABLATED] = noise_forced.Exchanged(added, None, at)
                if (read.kind, read.draw) == (NOISE, 0):
                    runs[ABLATED_CLEAN] = noise_forced.Exchanged(plain, None, at)
            for run, one in runs.items():
                line = {"role": rows.role, "added": read.kind, "draw": read.draw, "problem_id": read.problem}
                found.append(line | {"along": along, "run": run})
                exchanged.append(one)
    values = resumable.values(
        partial,
        "log_odds",
        f"  components exchanged in the {rows.role} model",
        [2 * len(one.text.ids) for one in exchanged],
        lambda done: noise_forced.exchange(
            rows.material.model(rows.role),
            exchanged,
            logit_lens.word_ids(rows.material.tokenizer, KEYWORDS),
            batch_size=rows.e.analysis.batch_size,
            done=done,
        ),
    )
    return [line | {"log_odds": value} for line, value in zip(found, values, strict=True)]


def tempered(rows: Rows, reads: Sequence[Read], found: Sequence[dict[str, Any]]) -> Table:
    """Each text at the temperature whose mean entropy at sentence starts is that under noise."""
    plain = [read for read in reads if (read.kind, read.text) == (UNSTEERED, TRACES)]
    noisy = [
        np.mean(one["entropy"])
        for read, one in zip(reads, found, strict=True)
        if (read.kind, read.text) == (NOISE, TRACES)
    ]
    if not plain:
        return []
    model, words = rows.material.model(rows.role), logit_lens.word_ids(rows.material.tokenizer, KEYWORDS)
    x = noise_forced.states(model, [read.forced for read in plain], batch_size=rows.e.analysis.batch_size)
    temperature = noise_forced.matching_temperature(
        lambda t: float(noise_forced.at_temperature(model, x, words, t)[1].mean()), float(np.mean(noisy))
    )
    if math.isnan(temperature):
        return []
    odds, entropy = noise_forced.at_temperature(model, x, words, temperature)
    return [
        {"role": rows.role, "problem_id": read.problem, "temperature": temperature}
        | {"entropy": float(entropy[i]), "log_odds": float(odds[i])}
        for i, read in enumerate(plain)
    ]
