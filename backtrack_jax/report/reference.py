"""The paper's numbers beside this run's, and which settings differ."""

import functools
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from backtrack_jax import labelling
from backtrack_jax.analysis.base import Analysis, asked
from backtrack_jax.analysis.results import Results


@functools.cache
def numbers() -> dict[str, Any]:
    """The paper's settings and numbers, as they ship with the program."""
    return json.loads((resources.files("backtrack_jax.report") / "reference.json").read_text("utf-8"))


def comparison(r: Results, analyses: Sequence[Analysis]) -> list[dict[str, str]]:
    """Table "paper / this run".

    Returns:
      Rows of `where`, `what`, `paper`, `released`, `run`; what this run did not measure says so.
    """
    run = {key: text for analysis in asked(analyses, r.experiment) for key, text in analysis.reference(r).items()}
    rows = []
    for key, entry in numbers()["numbers"].items():
        shown = {name: str(entry.get(name, "-")) for name in ("where", "what", "paper", "released")}
        rows.append(shown | {"run": run.get(key, "not measured")})
    return rows


def settings(r: Results) -> list[dict[str, str]]:
    """Settings of the paper and of this run; `same` is `yes`, `no` or empty where the reader has to judge."""
    e, paper = r.experiment, numbers()["settings"]
    run = {
        "base model": e.base.path if "base" in e.roles else "-",
        "reasoning model": e.reasoning.path if "reasoning" in e.roles else "-",
        "layers": r.n_layers,
        "labels by": labelling.judge_of(e).title(e),
        "label of the vector": r.label,
        "vector read at layer": r.layer,
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
