"""Whether a vector of another family's base model acts on the model that writes the traces, mapped into its states.

The other base model reads the same text through its own tokenizer, and its vector is the difference of means at the
tokens of its own that lie where the label's sections begin. Linear maps into the residual stream of the model that
writes the traces are fitted on states of both at the ends of words. What they make of the vector is added at the same
length as the model's own vector, to texts and in replies to problems on which nothing was read or fitted.

{role}.transfer_maps.csv     directions: cosine with the own vector, strength and fit of the map
{role}.transfer_effects.csv  change of the log-odds on each text under each direction
{role}.transfer_replies.csv  keywords and words of replies under some of them
transfer.csv                 the directions with their effects, and these as shares of the own vector's
"""

import math
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from backtrack_jax import generate
from backtrack_jax.analysis import log_odds, resumable, statistics
from backtrack_jax.analysis import transfer_vectors as tv
from backtrack_jax.analysis.backtracking import count_keywords
from backtrack_jax.analysis.base import Material, Planned, Question
from backtrack_jax.analysis.claims import Claim, measured, number
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.forced import Forced, given_text, logits_at_once
from backtrack_jax.analysis.plots import COLOURS, Panel, Plot, Series
from backtrack_jax.analysis.results import Results
from backtrack_jax.analysis.statistics import NAN, Region
from backtrack_jax.config import Experiment
from backtrack_jax.data.problems import spread
from backtrack_jax.data.records import UNSTEERED, Trace
from backtrack_jax.data.text import sentence_spans
from backtrack_jax.files import store, tables
from backtrack_jax.files.tables import Table
from backtrack_jax.intervention import Intervention, add_vector, no_intervention
from backtrack_jax.models.config import ModelConfig

CONTRAST = f"{tv.RIDGE} less {tv.SHUFFLED_PAIRS}"
"""The primary contrast: what the ridge map adds, less what it adds when it was fitted on pairs at random."""

_CONTROLS = (tv.SHUFFLED_PAIRS, tv.SHUFFLED_LABELS, tv.RANDOM)


class Transfer(Question):
    """From another base model into the model that writes the traces."""

    name = "transfer"
    of_replies = False
    settings = (
        *("seed", "prompt.think", "prompt.system", "analysis.folds", "analysis.forced_texts"),
        *("analysis.forced_sentences", "steering.main_layer", "steering.unit", "steering.magnitudes"),
        *("steering.span", "steering.temperature", "steering.top_p", "steering.top_k", "steering.max_new_tokens"),
    )
    role_tables = ("transfer_maps", "transfer_effects", "transfer_replies")
    tables = ("transfer",)

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """Its settings, and the other model and its tokenizer by content."""
        q = e.questions.transfer
        paths = {"weights": q.model.path, "its_tokenizer": q.tokenizer or q.model.path}
        return super().inputs(e) | {name: store.weights_id(path) if path else "" for name, path in paths.items()}

    def check(self, e: Experiment) -> None:
        """The other model and its tokenizer: that they are there, can be read, and fit each other."""
        q, reader = e.questions.transfer, tv.other_reader(e)  # first: a tokenizer is small
        config = tv.other_config(e)
        not_read = reader.not_read
        read = [i for i in range(reader.tokenizer.vocab_size - 1, -1, -1) if i not in not_read]
        if read and read[0] >= config.vocab_size:
            raise ValueError(
                f"questions.transfer.tokenizer={q.tokenizer!r} has the id {read[0]}, but {q.model.path} embeds "
                f"{config.vocab_size}; expected the tokenizer of that model"
            )

    def scratch(self, role: str) -> list[str]:
        """Window sums and states of both models, log-odds and replies, the last two appended batch by batch."""
        files = ("other.safetensors", "other_states.safetensors", "states.safetensors", "forced.jsonl", "replies.jsonl")
        return [f"{role}.transfer.{name}" for name in files]

    def of_role(self, material: Material, role: str, folder: Path) -> dict[str, Table]:
        """Reads both models, fits, and measures; nothing of the model that writes no traces."""
        if role != material.experiment.author:
            return {name: [] for name in self.role_tables}
        sums, other, own, forced, answered = (folder / name for name in self.scratch(role))
        found = tv.directions(material, role, (sums, other, own))
        return {
            "transfer_maps": found.lines,
            "transfer_effects": effects(material, role, found, forced),
            "transfer_replies": replies(material, role, found, answered),
        }

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """Shares of the own vector's effect."""
        role = material.experiment.author
        found = [tables.read(folder / f"{role}.{name}.csv") for name in self.role_tables]
        return {"transfer": summary(*found)}

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """One figure."""
        return [plot(r)]

    def sentences(self, r: Results) -> Sequence[str]:
        """The primary contrast."""
        of = {line["direction"]: line for line in r.tables["transfer"]}
        if CONTRAST not in of or math.isnan(of[CONTRAST]["share"]):
            return []
        line, ridge, control = (of[name] for name in (CONTRAST, tv.RIDGE, tv.SHUFFLED_PAIRS))
        return [
            f"The {r.label} vector of {_other(r)}, mapped by ridge regression, has {ridge['share']:.2f} of the effect "
            f"of the {r.author} model's own vector on the log-odds of wait or hmm, and {control['share']:.2f} if the "
            f"map is of shuffled pairs: a difference of {line['share']:.2f}{_ends(line)} on {line['problems']} "
            f"held-out problems; its cosine with the own vector is {ridge['cosine']:.2f}"
            f"{_ends(ridge, 'cosine')}."
        ]

    def claims(self, r: Results) -> Sequence[Claim]:
        """That a map between families carries the vector over."""
        changes = _changes(r.tables["transfer_effects"])
        if not {tv.OWN, tv.RIDGE, tv.SHUFFLED_PAIRS} <= changes.keys():
            return []
        own, ridge, control = _paired(changes, (tv.OWN, tv.RIDGE, tv.SHUFFLED_PAIRS))
        (line,) = (line for line in r.tables["transfer"] if line["direction"] == tv.RIDGE)
        return [
            measured(
                "transfer",
                f"The {r.label} vector of another family's base model acts through a linear map.",
                figure="transfer",
                where="-",
                rule="change of the log-odds on held-out problems under the vector that ridge regression maps, less "
                "that under the vector of shuffled pairs, above 0, in units of the change under the own vector",
                estimate=float(np.mean(ridge - control) / np.mean(own)),
                interval=statistics.mean_ratio_interval(ridge - control, own, level=LEVEL),
                unit="of the own vector's effect",
                region=Region(low=0),
                n=len(own),
                note=f"cosine with the own vector {number(line['cosine'])}; vector of {_other(r)}",
            )
        ]

    def plan(self, planned: Planned) -> str:
        """What the model that writes the traces and the other one read, and the replies."""
        e, q = planned.experiment, planned.experiment.questions.transfer
        texts = min(e.analysis.forced_texts or len(planned.trace_tokens), len(planned.trace_tokens))
        return (
            f"if it writes the traces, {q.model.path} is read in its place over the traces of "
            f"{100 * (1 - q.held_out):.3g} % of the problems, both at up to {2 * q.positions:,} ends of words, "
            f"log-odds after at most {texts * (4 + len(tv.MAPS) + len(_CONTROLS)):,} texts, and at most "
            f"{4 * q.replies:,} replies"
        )

    def memory(self, planned: Planned, config: ModelConfig) -> dict[str, int]:
        """The logits of some positions of a batch of texts."""
        e = planned.experiment
        n = logits_at_once(e.analysis.batch_size, config.vocab_size)
        return {"logits under mapped vectors": 4 * n // (e.data_parallel * e.model_parallel)}


TRANSFER = Transfer()


def _held_out(material: Material, limit: int) -> list[Trace]:
    """One trace for each held-out problem, at most so many (0: all)."""
    _, held_out = tv.split(material)
    of_problem = {trace.problem_id: trace for trace, _ in reversed(material.pairs)}
    return spread([of_problem[name] for name in held_out], limit)


def _added(material: Material, role: str, found: tv.Directions, name: str, draw: int) -> Intervention:
    """A direction at the length of the setting; of a control one of its draws, which come round."""
    e = material.experiment
    n_layers, width = material.sums[role].sums.shape[1], material.sums[role].sums.shape[-1]
    if name == UNSTEERED:
        return no_intervention(n_layers, width, e.steering.span)
    of_draws = found.of[name]
    vector = of_draws[draw % len(of_draws)]
    unit, length = jnp.asarray(vector / np.linalg.norm(vector), jnp.float32), tv.length(material, role)
    return add_vector(unit, e.steering.main_layer, length, n_layers=n_layers, span=e.steering.span)


def effects(material: Material, role: str, found: tv.Directions, partial: Path) -> Table:
    """Change of the log-odds of keywords on the trace of each held-out problem, under each direction.

    Every problem has another draw of a control, so that an interval over problems is one over draws too.
    """
    e = material.experiment
    read: list[tuple[str, str]] = []
    rows: list[Forced] = []
    for draw, trace in enumerate(_held_out(material, e.analysis.forced_texts)):
        ids, prompt_length, starts = given_text(material, role, trace, sentence_spans(trace)[1:])
        for name in (UNSTEERED, *found.of):
            read.append((trace.problem_id, name))
            rows.append(Forced(ids, prompt_length, starts, _added(material, role, found, name, draw)))
    values = log_odds.resumed(material, role, rows, partial, f"texts under mapped vectors of the {role} model")
    of = dict(zip(read, values, strict=True))
    return [
        {"role": role, "direction": name, "problem_id": problem, "change": value - of[problem, UNSTEERED]}
        for (problem, name), value in of.items()
        if name != UNSTEERED and math.isfinite(value - of[problem, UNSTEERED])
    ]


def replies(material: Material, role: str, found: tv.Directions, partial: Path) -> Table:
    """Keywords and words of one reply to each held-out problem: unsteered, own, best map and shuffled pairs."""
    e, s, tokenizer = material.experiment, material.experiment.steering, material.tokenizer
    if not e.questions.transfer.replies:
        return []
    asked: list[tuple[str, str]] = []
    rows: list[generate.Row] = []
    for draw, trace in enumerate(_held_out(material, e.questions.transfer.replies)):
        prompt, key = material.prompt_ids(role, trace.problem), generate.row_key(e.seed, trace.problem_id, 0)
        for name in (UNSTEERED, tv.OWN, found.best, tv.SHUFFLED_PAIRS):
            row = _added(material, role, found, name, draw)
            asked.append((name, trace.problem_id))
            rows.append(generate.Row(prompt, key, row, f"problem {trace.problem_id!r} under {name!r}"))

    def sampled(done: Container[int]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        for batch in generate.generate_rows(
            material.model(role),
            rows,
            sampling=generate.Sampling(s.temperature, s.top_p, s.top_k),
            stop_ids=tokenizer.stop_ids,
            vocab_size=tokenizer.vocab_size,
            max_new_tokens=s.max_new_tokens,
            batch_size=s.batch_size,
            done=done,
        ):
            texts = [(n, tokenizer.decode([i for i in reply.ids if i not in tokenizer.stop_ids])) for n, reply in batch]
            yield [(n, count_keywords(text)._asdict() | {"text": text}) for n, text in texts]

    tokens = [len(row.prompt) + s.max_new_tokens for row in rows]
    lines = resumable.lines(partial, f"  replies of the {role} model under mapped vectors", tokens, sampled)
    return [
        {"role": role, "direction": name, "problem_id": problem} | {of: line[of] for of in ("hits", "words", "text")}
        for (name, problem), line in zip(asked, lines, strict=True)
    ]


def summary(maps: Table, changes: Table, answered: Table) -> Table:
    """Cosine, effect, share of the own vector's effect and keyword rate of every direction, and of the contrast.

    Intervals of effects, shares (Fieller's) and rates are over held-out problems.
    """
    of_problem = _changes(changes)
    rates = _rates(answered)
    found: Table = []
    for line in maps:
        own, values = _paired(of_problem, (tv.OWN, line["direction"]))
        rate = rates.get(line["direction"], _NO_RATE)
        kept = {name: value for name, value in line.items() if name not in ("role", "problems")}
        found.append(kept | {"fitted_problems": line["problems"]} | _effect(values, own) | rate)
    own, ridge, control = _paired(of_problem, (tv.OWN, tv.RIDGE, tv.SHUFFLED_PAIRS))
    blank = {name: NAN for name in found[0] if name not in ("direction", "problems")}
    counts = dict.fromkeys(("draws", "positions", "fitted_problems", "hits", "words"), 0)
    found.append({"direction": CONTRAST} | blank | counts | _effect(ridge - control, own))
    if UNSTEERED in rates:
        found.append({"direction": UNSTEERED} | blank | counts | _effect(np.zeros(0), np.zeros(0)) | rates[UNSTEERED])
    return found


def _changes(lines: Table) -> dict[str, dict[str, float]]:
    """Direction -> problem -> change of the log-odds."""
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        found.setdefault(line["direction"], {})[line["problem_id"]] = line["change"]
    return found


def _paired(changes: dict[str, dict[str, float]], names: Sequence[str]) -> np.ndarray:
    """[directions, problems], of the problems that all of them have."""
    of = [changes.get(name, {}) for name in names]
    shared = [problem for problem in of[0] if all(problem in other for other in of)]
    return np.array([[one[problem] for problem in shared] for one in of])


def _effect(values: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    """Mean change and its share of the own vector's, one value of each a problem."""
    enough = len(values) > 1
    low, high = log_odds.interval(values) if enough else (NAN, NAN)
    share_low, share_high = statistics.mean_ratio_interval(values, own) if enough else (NAN, NAN)
    effect = float(np.mean(values)) if len(values) else NAN
    return {
        **{"problems": len(values), "effect": effect, "effect_low": low, "effect_high": high},
        **{"share": effect / float(np.mean(own)) if len(own) else NAN},
        **{"share_low": share_low, "share_high": share_high},
    }


_NO_RATE = {"hits": 0, "words": 0, "rate": NAN, "rate_low": NAN, "rate_high": NAN}


def _rates(answered: Table) -> dict[str, dict[str, Any]]:
    """Direction -> pooled keyword rate of its replies, with its interval over problems."""
    found = {}
    for name in dict.fromkeys(line["direction"] for line in answered):
        own = [line for line in answered if line["direction"] == name]
        hits, words = ([line[of] for line in own] for of in ("hits", "words"))
        low, high = statistics.rate_interval(hits, words)
        rate = sum(hits) / sum(words) if sum(words) else NAN
        found[name] = {"hits": sum(hits), "words": sum(words), "rate": rate, "rate_low": low, "rate_high": high}
    return found


def _ends(line: dict[str, Any], column: str = "share") -> str:
    low, high = line[f"{column}_low"], line[f"{column}_high"]
    return f" ({low:.2f} to {high:.2f})" if math.isfinite(low) and math.isfinite(high) else " (no interval)"


def _other(r: Results) -> str:
    return r.experiment.questions.transfer.model.path


def plot(r: Results) -> Plot | None:
    """Cosines, shares of the own vector's effect, and keyword rates, of every direction."""
    lines = [line for line in r.tables["transfer"] if line["direction"] not in (CONTRAST, UNSTEERED)]
    if not lines:
        return None
    answered = [line for line in r.tables["transfer"] if line["words"]]
    q, e = r.experiment.questions.transfer, r.experiment
    n, layer = lines[0]["problems"], int(lines[0]["other_layer"])
    panels = [
        [_panel("How alike they are", "cosine with the own vector", lines, "cosine", level=0.0)],
        [_panel("What they do on given text", "share of the own vector's effect", lines, "share", level=0.0)],
    ]
    if answered:
        panels.append([_panel("What they do in replies", "% of words that are wait or hmm", answered, "rate", 100)])
    at = next((line["positions"] for line in lines if line["direction"] == tv.RIDGE), 0)
    caption = (
        f"The {r.label} vector of {q.model.path} (block {layer}), mapped into the {r.author} model (block {r.layer}) "
        f"by maps that were fitted at {at:,} ends of words, beside own vectors and controls; all of them are read from "
        f"{100 * (1 - q.held_out):.0f} % of the problems. Shares: change of the log-odds of wait or hmm where a "
        f"sentence begins on given text of {n} other problems, at magnitude {tv.magnitude(e):g} ({e.steering.unit}), "
        f"over that under the own vector, {_changed(lines)} nats; 95 % intervals over problems (Fieller's). Cosines: "
        f"95 %, of the maps by a jackknife over {tv.N_GROUPS} groups of problems with everything fitted anew; of "
        f"controls the middle 95 % of {tv.N_DRAWS} draws. Rates: over problems."
    )
    return Plot("transfer", "A vector of another family", caption, panels, r.tables["transfer"], place=7.3)


def _changed(lines: Table) -> str:
    return f"{lines[0]['effect']:.2f} ({lines[0]['effect_low']:.2f} to {lines[0]['effect_high']:.2f})"


def _panel(title: str, axis: str, lines: Table, column: str, factor: float = 1, level: float | None = None) -> Panel:
    """One column of all directions, told apart by what they are."""
    names = [line["direction"] for line in lines]
    kinds = {
        "own": (tv.OWN, tv.BASE, tv.HALF, UNSTEERED),
        "of the other model": tv.MAPS,
        "controls": _CONTROLS,
    }
    series = []
    for i, (label, members) in enumerate(kinds.items()):
        own = [(x, line) for x, line in enumerate(lines) if line["direction"] in members]
        if not own:
            continue
        y, low, high = (
            [factor * line[name] if math.isfinite(line[name]) else NAN for _, line in own]
            for name in (column, f"{column}_low", f"{column}_high")
        )
        x = [at for at, _ in own]
        series.append(Series(label, x, y, low, high, colour=COLOURS[i], style="", marker="os^"[i]))
    return Panel(title, "", axis, series, categories=names, level=level)
