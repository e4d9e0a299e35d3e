"""`report.html`: the run as one self-contained page that opens from disk without a network.

Problems and replies are outside text. The template escapes whatever stands in markup; the script reads its data from a
JSON element in which `<` cannot occur, and puts text on the page as text only.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import markupsafe
from plotly.offline import get_plotlyjs

from backtrack_jax.analysis import cells
from backtrack_jax.analysis.agreement import judges_table
from backtrack_jax.analysis.base import Analysis
from backtrack_jax.analysis.plots import Plot
from backtrack_jax.analysis.results import Cell, Results
from backtrack_jax.data.records import UNSTEERED, Condition
from backtrack_jax.report import claims, interactive
from backtrack_jax.report.reference import comparison, settings
from backtrack_jax.report.summary import sentences

STALE = ".stale.js"
"""File beside the page, which says why it is out of date. Not an artifact, so that a mark does not damage the stage."""

_FIRST = 3
"""The paper's figure that stands beside the claims, above all others."""


def render(r: Results, plots: Sequence[Plot], analyses: Sequence[Analysis]) -> str:
    """The page as text."""
    files = resources.files("backtrack_jax.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals["table"] = _table
    figures = {plot.name: interactive.figure(plot) for plot in plots}
    found = claims.claims(r, analyses)
    described = [
        _described(plot, figures[plot.name])
        | {"first": plot.place == _FIRST}
        | {"verdicts": [f"{claim.verdict}: {claim.title}" for claim in found if claim.figure == plot.name]}
        for plot in plots
    ]
    data = {
        "label": r.label,
        "layer": r.layer,
        "figures": figures,
        "projections": [r.projections[role] for role in r.roles],
        "replies": _replies(r),
    }
    return environment.from_string((files / "page.html").read_text("utf-8")).render(
        name=r.experiment.name,
        css=(files / "page.css").read_text("utf-8"),
        js=(files / "page.js").read_text("utf-8"),
        plotly=get_plotlyjs(),
        stale=STALE,
        data=inert_json(data),
        label=r.label,
        figures=list(figures),
        sentences=sentences(r, analyses),
        comparison=comparison(r, analyses),
        compared_settings=settings(r),
        claims=claims.table(found),
        tally=claims.tally(found),
        plots=described,
        judges=judges_table(r),
        annotations=r.annotations.strip(),
        into_prompt=r.experiment.vectors.into_prompt,
        windows=[row for row in r.tables["windows"] if row["window"] == r.window],
        versions=_versions(r),
        config=json.dumps(dataclasses.asdict(r.experiment), indent=1, ensure_ascii=False),
        version=r.environment["versions"]["backtrack-jax"],
        revision=r.environment["git_revision"],
    )


def inert_json(value: Any) -> str:
    """JSON that cannot end the script element that it stands in, nor begin a comment or another element there."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> markupsafe.Markup:
    """Rows as an HTML table; every cell is escaped."""
    head = markupsafe.Markup().join(markupsafe.Markup("<th>{}</th>").format(title) for title in columns.values())
    body = markupsafe.Markup().join(
        markupsafe.Markup("<tr>{}</tr>\n").format(
            markupsafe.Markup().join(markupsafe.Markup("<td>{}</td>").format(row[name]) for name in columns)
        )
        for row in rows
    )
    frame = '<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>\n{}</tbody></table></div>'
    return markupsafe.Markup(frame).format(head, body)


def _described(plot: Plot, figure: dict[str, Any]) -> dict[str, Any]:
    """What the template needs of a figure; one of several columns scrolls sideways on a phone."""
    columns = max(len(row) for row in plot.panels)
    width = 420 if columns == 1 else 330 * columns
    return {"name": plot.name, "title": plot.title, "caption": plot.caption, "width": width} | {
        "height": figure["layout"]["height"]
    }


def _versions(r: Results) -> list[dict[str, str]]:
    device = r.environment["device"]
    named = dict(r.environment["versions"]) | {
        "device": f"{device['count']} x {device['kind']} ({device['platform']})",
        "revision": r.environment["git_revision"],
    }
    return [{"name": name, "value": value} for name, value in named.items()]


def _replies(r: Results) -> dict[str, Any]:
    """Replies to a few problems under every condition at the steered layer, and which two are shown first."""
    shown = [c for c in r.tables["rates"] if c["layer"] == r.layer and c["window"] in ("", r.window)]
    number = {Condition.of(cell): i for i, cell in enumerate(shown)}
    problems: dict[str, dict[str, Any]] = {}
    for reply in r.replies:
        if reply.sample or reply.condition not in number:
            continue
        if reply.problem_id not in problems and len(problems) == r.experiment.analysis.shown:
            continue
        problem = problems.setdefault(
            reply.problem_id, {"id": reply.problem_id, "problem": reply.problem, "replies": [None] * len(shown)}
        )
        problem["replies"][number[reply.condition]] = {"text": reply.text, "finish_reason": reply.finish_reason}
    own, plain = cells.steered(cells.under_own_vectors(r, r.author)), r.unsteered(r.author)
    best = max(own, key=lambda cell: (cell["rate"], cell["magnitude"]), default=None)
    return {
        "conditions": [{"name": _name(cell), "numbers": _numbers(cell)} for cell in shown],
        "problems": list(problems.values()),
        "left": number[Condition.of(plain)] if plain else 0,
        "right": number[Condition.of(best)] if best else len(shown) - 1,
    }


def _name(cell: Cell) -> str:
    if cell["kind"] == UNSTEERED:
        return f"{cell['target']} model, unsteered"
    source = f", {cell['source']}-derived" if cell["source"] else ""
    return f"{cell['target']} model + {cell['magnitude']:g} x {cell['kind']}{source}"


def _numbers(cell: Cell) -> str:
    return (
        f"all {cell['n_replies']} replies: {100 * cell['rate']:.2f} % wait or hmm, log-likelihood "
        f"{cell['log_likelihood']:.2f}, {100 * cell['repeated_3grams']:.0f} % repeated 3-grams"
    )
