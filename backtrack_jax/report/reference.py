"""The paper's numbers beside this run's, and which settings differ."""

import functools
import json
import math
from importlib import resources
from typing import Any

from backtrack_jax.data.records import UNSTEERED, window_name
from backtrack_jax.judges.base import trace_judge
from backtrack_jax.report.results import Results, Rows

LABEL = "backtracking"
"""The label of the vectors that the paper's numbers are about."""


@functools.cache
def numbers() -> dict[str, Any]:
    """The paper's settings and numbers, as they ship with the program."""
    return json.loads((resources.files("backtrack_jax.report") / "reference.json").read_text("utf-8"))


def highest(cells: Rows, *, either_way: bool = False) -> dict[str, Any] | None:
    """The steered cell that has the highest rate; of equal ones the most steered.

    Args:
      cells: rows of rates.csv.
      either_way: whether negative magnitudes count too, as they have to where a direction's sign means nothing: noise,
        random directions, and whatever a vector is compared with. Else cells steered along the direction alone do.
    """
    steered = (c for c in cells if c["kind"] != UNSTEERED and (c["magnitude"] > 0 or either_way))
    return max(steered, key=lambda cell: (cell["rate"], abs(cell["magnitude"])), default=None)


def on_fewer(r: Results, cell: dict[str, Any]) -> str:
    """How many problems a cell has, to be appended where it has fewer than the run."""
    return f", {cell['n_problems']} problems" if cell["n_problems"] < r.n_problems else ""


def interval(cell: dict[str, Any]) -> str:
    """95 % interval of a cell's rate in % of words; empty where there is none.

    Problems without a hit, drawn again, never have one: there the bootstrap would be sure of 0. The rule of three says
    how high the rate may be: 3 / words.
    """
    if cell["n_words"] and not cell["n_hits"]:
        return f"no hit in {cell['n_words']} words: at most {min(100, 300 / cell['n_words']):.2f}"
    return "" if math.isnan(cell["low"]) else f"{100 * cell['low']:.2f} to {100 * cell['high']:.2f}"


def percent(cell: dict[str, Any]) -> str:
    """Rate of a cell in % of words, with its interval where there is one."""
    bounds = interval(cell)
    return _percent(cell["rate"]) + (f" ({bounds})" if bounds else "")


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
        "labels by": e.annotations.openai.model if trace_judge(e) == "openai" else trace_judge(e),
        "label of the vector": e.vectors.label,
        "vector read at layer": e.steering.main_layer,
        "window": list(e.vectors.window),
        "contrast": e.vectors.contrast,
        "estimator": e.vectors.estimator,
        "windows into the prompt": e.vectors.into_prompt,
        "unit of magnitudes": e.steering.unit,
        "span": e.steering.span,
        "new tokens": e.steering.max_new_tokens,
        "problems": r.n_problems,
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
    return (_own_vectors(r) if r.experiment.vectors.label == LABEL else {}) | _baselines(r)


def _baselines(r: Results) -> dict[str, str]:
    """Highest rates under what a vector is compared with; the experiment's own vector is no baseline."""
    found = {}
    for key, kinds in {
        "noise": ("noise",),
        "self-amplification": ("self-amplification",),
        "other_baselines": ("overall-mean", "deduction", "initializing"),
    }.items():
        others = [kind for kind in kinds if kind != r.experiment.vectors.label]
        tried = [cell for kind in others for source in (r.author, "") for cell in r.cells(r.author, kind, source)]
        if best := highest(tried, either_way=True):
            named = f" ({best['kind']})" if len(kinds) > 1 else ""
            found[key] = f"{percent(best)} at magnitude {best['magnitude']:g}{named}{on_fewer(r, best)}"
    return found


def _own_vectors(r: Results) -> dict[str, str]:
    """What the experiment's vectors are, do and tell; beside the paper's numbers only where they have its label."""
    e, author = r.experiment, r.author
    label, layer = e.vectors.label, e.steering.main_layer
    found = {}
    for row in r.tables["similarity"]:
        if (row["label"], row["layer"]) == (label, layer):
            if row["cosine"] == row["cosine"]:
                found["cosine"] = f"{row['cosine']:.3f} at layer {layer}"
            found |= {f"norm_{role}": f"{row[f'norm_{role}']:.3g}" for role in r.roles}
    found |= _offsets_and_layers(r)
    for source in r.roles:
        if best := highest(r.cells(author, label, source)):
            plain, best = r.beside_unsteered(best)
            start = f"{_percent(plain['rate'])}, then " if plain else ""
            found[f"{source}_on_{author}"] = (
                f"{start}{percent(best)} at magnitude {best['magnitude']:g}{on_fewer(r, best)}"
            )
    on_base = [cell for source in r.roles for cell in r.cells("base", label, source)] if "base" in r.roles else []
    if best := highest(on_base):
        found["on_base"] = f"{percent(best)} at magnitude {best['magnitude']:g}"
    return found | _readings(r)


def _offsets_and_layers(r: Results) -> dict[str, str]:
    e, found = r.experiment, {}
    windows = {window_name(e.vectors.window_at(offset)): offset for offset in e.steering.offsets}
    swept = [cell for cell in r.offset_cells() if cell["kind"] != UNSTEERED]
    if best := highest(swept):
        at = f"offset {windows[best['window']]}, magnitude {best['magnitude']:g}" if best["rate"] else "every offset"
        found["best_offset"] = f"{percent(best)} at {at}{on_fewer(r, best)}"
    if best := highest([cell for cell in swept if windows[cell["window"]] == 0]):
        found["offset_zero"] = f"{percent(best)} at magnitude {best['magnitude']:g}{on_fewer(r, best)}"
    by_layer = r.layer_cells()
    for source in r.roles:
        if best := highest([cell for cell in by_layer if cell["source"] == source]):
            of, rate = len(r.vectors[r.author]["mean_norm"]), _percent(best["rate"])
            which = f"{best['layer']} of {of}" if best["rate"] else "none"
            found[f"best_layer_{source}"] = f"{which} ({rate} % of words{on_fewer(r, best)})"
    return found


def _readings(r: Results) -> dict[str, str]:
    """What needs no steering: lens, probe, judge."""
    found, layer = {}, r.experiment.steering.main_layer
    scores = {
        row["layer"]: row["score"]
        for row in r.tables["lens"]
        if (row["source"], row["unembedding"], row["final_norm"]) == ("base", "base", 0)
    }
    if scores:
        found["lens"] = f"{scores[layer]:.3g} at layer {layer}, {scores[max(scores)]:.3g} at layer {max(scores)}"
    for row in r.tables["probe"]:
        mine = (row["role"], row["layer"], row["method"]) == (r.author, layer, "base-derived direction")
        if mine and not math.isnan(row["auc"]):
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
