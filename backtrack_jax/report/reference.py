"""The paper's numbers beside this run's, and which settings differ."""

import functools
import json
from importlib import resources
from typing import Any

from backtrack_jax.conditions import UNSTEERED
from backtrack_jax.report.results import Results, Rows


@functools.cache
def numbers() -> dict[str, Any]:
    """The paper's settings and numbers, as they ship with the program."""
    return json.loads((resources.files("backtrack_jax.report") / "reference.json").read_text("utf-8"))


def highest(cells: Rows) -> dict[str, Any] | None:
    """The cell steered along (not against) a direction that has the highest rate; of equal ones the most steered."""
    steered = (cell for cell in cells if cell["kind"] != UNSTEERED and cell["magnitude"] > 0)
    return max(steered, key=lambda cell: (cell["rate"], cell["magnitude"]), default=None)


def percent(cell: dict[str, Any], *, interval: bool = True) -> str:
    """Rate of a cell in % of words, with its interval where there is one."""
    text = f"{100 * cell['rate']:.2f}"
    if interval and cell["low"] == cell["low"]:
        text += f" ({100 * cell['low']:.2f} to {100 * cell['high']:.2f})"
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.2f}" if share == share else "-"


def comparison(r: Results) -> list[dict[str, str]]:
    """Table "paper / this run".

    Returns:
      Rows of `where`, `what`, `paper`, `released`, `run`; what this run did not measure says so.
    """
    run = _this_run(r)
    rows = []
    for key, entry in numbers()["numbers"].items():
        shown = {name: str(entry.get(name, "-")) for name in ("where", "what", "paper", "released")}
        rows.append(shown | {"run": run.get(key, "not measured")})
    return rows


def settings(r: Results) -> list[dict[str, str]]:
    """Settings of the paper and of this run; `same` is `yes`, `no` or empty where that is for the reader to say."""
    e, paper = r.experiment, numbers()["settings"]
    run = {
        "base model": e.base.path if "base" in e.roles else "-",
        "reasoning model": e.reasoning.path if "reasoning" in e.roles else "-",
        "layers": len(r.vectors[r.author]["mean_norm"]),
        "labels by": e.annotations.openai.model if e.judge == "openai" else e.judge,
        "vector read at layer": e.steering.layer,
        "window": list(e.vectors.window),
        "contrast": e.vectors.contrast,
        "estimator": e.vectors.estimator,
        "windows into the prompt": e.vectors.into_prompt,
        "unit of magnitudes": e.steering.unit,
        "span": e.steering.span,
        "new tokens": e.steering.max_new_tokens,
        "problems": len({line["problem_id"] for line in r.generations}),
    }
    rows = []
    for name, value in run.items():
        same = "" if isinstance(paper[name], str) and " " in paper[name] else "yes" if value == paper[name] else "no"
        if name.endswith("model"):
            same = "yes" if str(value).endswith(paper[name]) else "no"
        rows.append({"setting": name, "paper": str(paper[name]), "run": str(value), "same": same})
    return rows


def _this_run(r: Results) -> dict[str, str]:
    """Key of reference.json -> what this run gave, as text."""
    e, author = r.experiment, r.author
    label, layer = e.vectors.label, e.steering.layer
    found = {}
    for row in r.tables["similarity"]:
        if (row["label"], row["layer"]) == (label, layer):
            if row["cosine"] == row["cosine"]:
                found["cosine"] = f"{row['cosine']:.3f} at layer {layer}"
            found |= {f"norm_{role}": f"{row[f'norm_{role}']:.3g}" for role in r.roles}
    found |= _offsets_and_layers(r)
    plain = r.unsteered(author)
    start = f"{100 * plain['rate']:.2f}, then " if plain else ""
    for source in r.roles:
        if best := highest(r.cells(author, label, source)):
            found[f"{source}_on_{author}"] = f"{start}{percent(best)} at magnitude {best['magnitude']:g}"
    on_base = [cell for source in r.roles for cell in r.cells("base", label, source)] if "base" in r.roles else []
    if best := highest(on_base):
        found["on_base"] = f"{percent(best)} at magnitude {best['magnitude']:g}"
    for key, kinds in {
        "noise": ("noise",),
        "self-amplification": ("self-amplification",),
        "other_baselines": ("overall-mean", "deduction", "initializing"),
    }.items():
        tried = [cell for kind in kinds for source in (author, "") for cell in r.cells(author, kind, source)]
        if best := highest(tried):
            named = f" ({best['kind']})" if len(kinds) > 1 else ""
            found[key] = f"{percent(best)} at magnitude {best['magnitude']:g}{named}"
    return found | _readings(r)


def _offsets_and_layers(r: Results) -> dict[str, str]:
    e, author, found = r.experiment, r.author, {}
    mine = [
        row
        for row in r.tables["rates"]
        if (row["target"], row["kind"]) == (author, e.vectors.label)
        and row["magnitude"] in (e.steering.grid_magnitudes or e.steering.magnitudes)
        and row["magnitude"] > 0
    ]
    windows = {f"{a}..{b}": o for o in e.steering.offsets for a, b in [e.vectors.window_at(o)]}
    swept = [
        row for row in mine if row["source"] == author and row["layer"] == e.steering.layer and row["window"] in windows
    ]
    if best := highest(swept):
        found["best_offset"] = f"{percent(best)} at offset {windows[best['window']]}, magnitude {best['magnitude']:g}"
    if best := highest([row for row in swept if windows[row["window"]] == 0]):
        found["offset_zero"] = f"{percent(best)} at magnitude {best['magnitude']:g}"
    for source in r.roles:
        by_layer = [row for row in mine if row["source"] == source and row["window"] == r.window]
        if e.steering.layers and (best := highest([row for row in by_layer if row["layer"] in e.steering.layers])):
            of = len(r.vectors[author]["mean_norm"])
            found[f"best_layer_{source}"] = f"{best['layer']} of {of} ({percent(best, interval=False)} % of words)"
    return found


def _readings(r: Results) -> dict[str, str]:
    """What needs no steering: lens, probe, judge."""
    found, layer = {}, r.experiment.steering.layer
    scores = {
        row["layer"]: row["score"]
        for row in r.tables["lens"]
        if (row["source"], row["unembedding"], row["final_norm"]) == ("base", "base", 0)
    }
    if scores:
        found["lens"] = f"{scores[layer]:.3g} at layer {layer}, {scores[max(scores)]:.3g} at layer {max(scores)}"
    for row in r.tables["probe"]:
        if (row["role"], row["layer"], row["method"]) == (r.author, layer, "base-derived direction"):
            found["probe"] = f"{row['auc']:.3f} ({row['low']:.3f} to {row['high']:.3f}), next {row['horizon']} tokens"
    compared = [(f"at magnitude {row['group']}", row) for row in r.tables.get("judge_agreement", [])]
    compared = [(where, row) for where, row in compared if row["group"] != "all"]
    if not compared:
        compared = [("on the traces", row) for row in r.tables.get("agreement", []) if row["group"] == "all"]
    if compared:
        found["judge"] = "; ".join(
            " / ".join(_percent(row[name]) for name in ("precision", "recall", "f1")) + f" {where}"
            for where, row in compared
        )
    return found
