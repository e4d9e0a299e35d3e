"""How often replies backtrack, and how coherent they stay: Eq. 1 by condition, Fig. 3 and Fig. 4."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from backtrack_jax.analysis import cells, coherence, judged, logit_lens, rate_claims, replies, resumable
from backtrack_jax.analysis.base import Analysis, Material, Planned
from backtrack_jax.analysis.claims import Claim
from backtrack_jax.analysis.forced import logits_at_once
from backtrack_jax.analysis.plots import COLOURS, MARKERS, Panel, Plot, Series, line_of
from backtrack_jax.analysis.results import PAPER_LABEL, Cell, Results, extent
from backtrack_jax.config import SteeringSpec
from backtrack_jax.data.records import Reply
from backtrack_jax.data.text import KEYWORDS
from backtrack_jax.files import store, tables
from backtrack_jax.files.tables import Table
from backtrack_jax.kinds import ADD, is_vector_file, parse
from backtrack_jax.models.config import ModelConfig

_REPLIES = "replies"
_COHERENCE = (
    "Beside the rate (Eq. 1): mean log-likelihood of the reply under the unsteered model, and repeated 3-grams."
)


class Rates(Analysis):
    """A line per reply, per condition, and per condition and problem."""

    name = "rates"
    version = 2  # other intervals; the effect and the rate of keyword tokens are pooled
    reads = (judged.JUDGED.name,)
    tables = (_REPLIES, "rates", "effects")

    def scratch(self, role: str) -> list[str]:
        """Likelihoods of the replies, appended batch by batch."""
        return [_likelihoods(role)]

    def of_role(self, material: Material, role: str, folder: Path) -> dict[str, Table]:
        """Log-likelihood of every reply under the unsteered model."""
        if not (folder / f"{_REPLIES}.csv").exists():
            measure_likelihoods(material, role, folder / _likelihoods(role))
        return {}

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """Counts words, and sums up."""
        file = folder / f"{_REPLIES}.csv"
        lines = tables.read(file) if file.exists() else _measured(material, folder)
        summary = replies.summarise(lines)
        return {_REPLIES: lines, "rates": summary, "effects": replies.effects(lines)}

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """Fig. 3, Fig. 4; the metric's variants; the effect on every problem."""
        return [pairs(r), baselines(r), metrics(r), effects(r)]

    def sentences(self, r: Results) -> Sequence[str]:
        """What steering reached, on both models, beside other directions; by the judge; at what coherence."""
        return [*_steering(r), _others(r), _by_the_judge(r), _coherence(r)]

    def reference(self, r: Results) -> dict[str, str]:
        """Highest rates: of the vectors of the paper's label, and of what they are compared with."""
        return (_reached(r) if r.label == PAPER_LABEL else {}) | _baselines_reached(r)

    def claims(self, r: Results) -> Sequence[Claim]:
        """Whether the vectors work, comparably, unlike controls, and backwards."""
        return rate_claims.claims(r)

    def plan(self, planned: Planned) -> str:
        """Likelihoods of all replies."""
        tokens = planned.replies * planned.reply_tokens
        return f"likelihood of {planned.replies} replies, at most {tokens:,} tokens"

    def memory(self, planned: Planned, config: ModelConfig) -> dict[str, int]:
        """The logits of some positions of a batch."""
        e = planned.experiment
        n = logits_at_once(e.analysis.batch_size, config.vocab_size)
        return {"logits": 4 * n // (e.data_parallel * e.model_parallel)}


RATES = Rates()


def _likelihoods(role: str) -> str:
    return f"{role}.likelihoods.jsonl"


def _of(replies_: Sequence[Reply], role: str) -> list[Reply]:
    return [reply for reply in replies_ if reply.condition.target == role]


def measure_likelihoods(material: Material, role: str, partial: Path) -> None:
    """Appends the likelihoods of a model's replies to a file, except those already in it."""
    found = _of(material.replies, role)
    asked = {reply.problem: material.prompt_ids(role, reply.problem) for reply in found}
    resumable.values(
        partial,
        "log_likelihood",
        f"  likelihood under the unsteered {role} model",
        [len(reply.ids) for reply in found],
        lambda done: coherence.log_likelihoods(
            material.model(role),
            [asked[reply.problem] for reply in found],
            [reply.ids for reply in found],
            batch_size=material.experiment.analysis.batch_size,
            done=done,
        ),
    )


def _measured(material: Material, folder: Path) -> Table:
    """A line per reply, in the order of generations.jsonl."""
    ids = logit_lens.word_ids(material.tokenizer, KEYWORDS)
    likelihoods = {}
    for role in material.experiment.roles:
        if (partial := folder / _likelihoods(role)).exists():
            in_order = sorted(store.read_lines(partial), key=lambda line: line["row"])
            likelihoods[role] = iter([line["log_likelihood"] for line in in_order])
    labels = judged.read(material, folder) or [None] * len(material.replies)
    prompts: dict[tuple[str, str], str] = {}
    lines, marks = [], material.experiment.traces.end_marks
    for reply, label in zip(material.replies, labels, strict=True):
        role = reply.condition.target
        asked = (role, reply.problem)
        if asked not in prompts:
            prompts[asked] = material.tokenizer.decode(material.prompt_ids(*asked))
        lines.append(replies.measure(reply, prompts[asked], ids, next(likelihoods[role]), label, marks))
    return lines


# Figures


def pairs(r: Results) -> Plot | None:
    """Fig. 3: rate against magnitude for the pairs of steered model and source of the vector."""
    if r.label not in r.experiment.steering.kinds:
        return None
    found = {(t, s): r.cells(t, r.label, s) for t in r.roles for s in r.roles}
    panels = []
    for measure, y_label, factor in cells.MEASURES:
        row = []
        for target in r.roles:
            series = [
                cells.curve(f"{s}-derived vector", found[target, s], measure, factor, line_of(r.roles.index(s), s))
                for s in r.roles
            ]
            title = f"{target} model" if measure == "rate" else ""
            row.append(Panel(title, cells.unit_label(r, target), y_label, series, from_zero=measure == "rate"))
        panels.append(row)
    drawn = cells.unique([cell for of_pair in found.values() for cell in of_pair])
    caption = f"{r.label} vectors, {cells.setting(r)}; {cells.counted(drawn)}. {cells.RATE_INTERVAL} {_COHERENCE}"
    return Plot("fig3_pairs", "Fig. 3: model and vector", caption, panels, drawn, place=3)


def baselines(r: Results) -> Plot | None:
    """Fig. 4: the experiment's vector against other directions, on the model that writes the traces."""
    s, author = r.experiment.steering, r.author
    found = {}
    for kind in s.all_kinds:
        own = [cell for cell in r.cells(author, kind, author) if cell["kind"] == kind]
        of_kind = r.cells(author, kind, author if own else "")
        if any(cell["kind"] == kind for cell in of_kind):
            found[kind] = of_kind
    if not set(found) - {r.label}:
        return None
    names = [Path(kind).name if is_vector_file(kind) else kind for kind in found]
    names = [name if names.count(name) == 1 else kind for name, kind in zip(names, found, strict=True)]
    magnitudes = [cell["magnitude"] for of_kind in found.values() for cell in of_kind]
    aside = 0.006 * (max(magnitudes) - min(magnitudes))  # so that intervals do not hide each other
    lines = [
        (name, of_kind, line_of(i, "base"), aside * (i - (len(found) - 1) / 2))
        for i, (name, of_kind) in enumerate(zip(names, found.values(), strict=True))
    ]
    panels = [
        [
            Panel(
                "",
                cells.unit_label(r, author, list(found)),
                y_label,
                [cells.curve(name, of_kind, measure, factor, line, shift) for name, of_kind, line, shift in lines],
                from_zero=measure == "rate",
            )
        ]
        for measure, y_label, factor in cells.MEASURES
    ]
    drawn = cells.unique([cell for of_kind in found.values() for cell in of_kind])
    files = " or as a file has them" if s.vector_files else ""
    equal = ", all of equal norm at a magnitude" if _equally_long(s, s.all_kinds) else ""
    caption = (
        f"{author} model, directions from its own activations{files}{equal}; {cells.setting(r)}; "
        f"{cells.counted(drawn)}. noise: fresh at every position and step; random: one direction a reply; shuffled: D+ "
        f"drawn from all sections. {cells.RATE_INTERVAL} Points of one magnitude stand side by side. {_COHERENCE}"
    )
    return Plot("fig4_baselines", f"Fig. 4: baselines on the {author} model", caption, panels, drawn, place=4)


def _equally_long(s: SteeringSpec, entries: Sequence[str]) -> bool:
    """Whether all of these are as long as each other at one magnitude; files may not be, and shares are no lengths."""
    lengths = all(parse(entry).what.strength == "length" for entry in entries)
    return lengths and s.unit != "kl" and not (s.unit == "raw" and s.vector_files)


def metrics(r: Results) -> Plot | None:
    """Variants of the metric on the experiment's own vector."""
    if r.label not in r.experiment.steering.kinds:
        return None
    own = r.cells(r.author, r.label, r.author)
    names = {
        "rate": "words of the reply (Eq. 1)",
        "substring_rate": "substrings, prompt + reply (released)",
        "token_rate": "keyword tokens",
        "sentence_rate": "sentences with a keyword",
    }
    by_judge = ""
    if not all(math.isnan(cell["judge_rate"]) for cell in own):
        by_judge = f", of which the judge labelled {extent(own, 'n_judged')}"
        names["judge_rate"] = f"sentences that backtrack, by {r.judge}"
    curves = [cells.curve(text, own, n, 100, line_of(i, "base")) for i, (n, text) in enumerate(names.items())]
    panels = [
        Panel("", cells.unit_label(r, r.author), y_label, series, from_zero=True)
        for y_label, series in (("% of words, tokens", curves[:3]), ("% of sentences", curves[3:]))
    ]
    caption = (
        f"The same replies, counted in {len(names)} ways: {r.author}-derived vector on the {r.author} model, "
        f"{cells.setting(r)}; {cells.counted(own)}{by_judge}. {cells.RATE_INTERVAL}"
    )
    return Plot("metrics", "The metric and its variants", caption, [panels], own)


def effects(r: Results) -> Plot | None:
    """Effect on every problem: does the vector work on each, or on a few?"""
    lines = [
        line
        for line in r.tables["effects"]
        if (line["target"], line["kind"], line["layer"], line["window"]) == (r.author, r.label, r.layer, r.window)
    ]
    if not lines:
        return None
    problems = sorted({line["problem_id"] for line in lines})
    counts = Counter((line["source"], line["magnitude"]) for line in lines)
    magnitudes = sorted({line["magnitude"] for line in lines})
    lane = 0.38 * min((b - a for a, b in itertools.pairwise(magnitudes)), default=1.0)  # of a source, at a magnitude
    place = {problem: lane * (n + 0.5) / len(problems) for n, problem in enumerate(problems)}
    series = []
    for i, source in enumerate(r.roles):
        own = [line for line in lines if line["source"] == source]
        left = lane * (i - len(r.roles) / 2)
        series.append(
            Series(
                f"{source}-derived vector",
                [line["magnitude"] + left + place[line["problem_id"]] for line in own],
                [100 * line["effect"] for line in own],
                colour=COLOURS[i],
                style="",
                marker=MARKERS[i],
            )
        )
    panel = Panel("", cells.unit_label(r, r.author), "change of the rate, % of words", series, level=0.0)
    points = extent([{"points": count} for count in counts.values()], "points")
    caption = (
        f"Rate under steering less the unsteered rate, one point per problem ({points}), side by side in one order at "
        f"each magnitude; {r.author} model, {cells.setting(r)}."
    )
    return Plot("effects", "Effect on single problems", caption, [[panel]], lines)


# Sentences


def _steering(r: Results) -> list[str]:
    author, plain = r.author, r.unsteered(r.author)
    reached, texts = [], []
    for source in r.roles:
        if best := cells.highest(r, r.cells(author, r.label, source)):
            text = f"{cells.rate(best.cell)} % at magnitude {best.cell['magnitude']:g}"
            text += f" with the {source}-derived {r.label} vector (on {best.cell['n_problems']} problems"
            text += f", and {cells.rate(best.unsteered)} % unsteered on these)" if best.unsteered else ")"
            reached.append(text)
    if reached and plain:
        on = cells.on_fewer(r, plain)
        texts.append(f"Unsteered, the {author} model says wait or hmm in {cells.rate(plain)} % of its words{on}.")
    if reached:
        says = "it says so" if plain else f"the {author} model says wait or hmm"
        texts.append(
            f"Steered, {says} in {', and '.join(reached)}: in brackets 95 % intervals over problems; one half of the "
            "problems chose the magnitude, rates are of the other."
        )
    if author != "base" and "base" in r.roles and (best := cells.highest(r, cells.under_own_vectors(r, "base"))):
        texts.append(
            f"The base model reached {cells.rate(best.cell)} % with the vector and the magnitude that did most on the "
            "other half of the problems."
        )
    return texts


def _others(r: Results) -> str:
    s = r.experiment.steering
    others = [kind for kind in s.all_kinds if kind != r.label]
    noun = "direction" if all(parse(kind).what is ADD for kind in others) else "intervention"
    directions = f"{len(others)} other {noun}{'s' * (len(others) > 1)}"
    directions += " of equal norm" if _equally_long(s, others) else ""
    tried = _of_kinds(r, others)
    if tried and not any(cell["n_hits"] for cell in tried):
        return f"None of {directions} on the {r.author} model made it say so."
    best = cells.highest(r, tried, either_way=True)
    if not best:
        return ""
    return (
        f"Of {directions} on the {r.author} model, {best.cell['kind']} reached most on one half of the problems: "
        f"{cells.rate(best.cell)} % at magnitude {best.cell['magnitude']:g} on the other."
    )


def _of_kinds(r: Results, kinds: Sequence[str]) -> list[Cell]:
    """Steered cells of what a vector is compared with, from the steered model's own activations or from none."""
    found = [cell for kind in kinds for source in (r.author, "") for cell in r.cells(r.author, kind, source)]
    return cells.steered(found, either_way=True)


def _highest(r: Results) -> tuple[Cell, Cell] | None:
    """The unsteered cell of the model that writes the traces, and its highest one under the experiment's vectors.

    Both over the half of the problems that did not choose it; None if one of them was not sampled.
    """
    best = cells.highest(r, cells.under_own_vectors(r, r.author))
    return (best.unsteered, best.cell) if best and best.unsteered else None


def _by_the_judge(r: Results) -> str:
    pair = _highest(r)
    if not pair or math.isnan(pair[1]["judge_rate"]):
        return ""
    plain, best = pair
    shares = [f"{100 * cell['judge_rate']:.0f} %" for cell in (best, plain)]
    return (
        f"At the highest rate of these vectors the judge ({r.experiment.analysis.judge}) calls {shares[0]} of the "
        f"sentences backtracking (unsteered {shares[1]}); it labelled {best['n_judged']} of {best['n_replies']} "
        f"replies (unsteered {plain['n_judged']} of {plain['n_replies']})."
    )


def _coherence(r: Results) -> str:
    pair = _highest(r)
    if not pair:
        return ""
    plain, best = pair
    return (
        "At the highest rate the replies' mean log-likelihood under the unsteered model is "
        f"{best['log_likelihood']:.2f} nats a token (unsteered {plain['log_likelihood']:.2f}), and "
        f"{100 * best['repeated_3grams']:.0f} % of their 3-grams are repeated (unsteered "
        f"{100 * plain['repeated_3grams']:.0f} %)."
    )


# Beside the paper's numbers


def _reached(r: Results) -> dict[str, str]:
    """Highest rates under the experiment's vectors, on both models."""
    found = {}
    for source in r.roles:
        if own := cells.steered(r.cells(r.author, r.label, source)):
            best = cells.highest(r, own)
            start = f"{cells.percent(best.unsteered['rate'])}, then " if best and best.unsteered else ""
            found[f"{source}_on_{r.author}"] = start + _shown(best)
    if "base" in r.roles and (own := cells.steered(cells.under_own_vectors(r, "base"))):
        found["on_base"] = _shown(cells.highest(r, own))
    return found


def _shown(best: cells.Highest | None) -> str:
    return cells.at_magnitude(best.cell) + cells.by_halves(best) if best else cells.TOO_FEW


def _baselines_reached(r: Results) -> dict[str, str]:
    """Highest rates under what a vector is compared with; the experiment's own vector is not a baseline."""
    found = {}
    for key, kinds in {
        "noise": ("noise",),
        "self-amplification": ("self-amplification",),
        "other_baselines": ("overall-mean", "deduction", "initializing"),
    }.items():
        if tried := _of_kinds(r, [kind for kind in kinds if kind != r.label]):
            best = cells.highest(r, tried, either_way=True)
            named = f" ({best.cell['kind']})" if best and len(kinds) > 1 else ""
            found[key] = _shown(best) + named
    return found
