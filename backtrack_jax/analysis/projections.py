"""Tokens of a few traces with the projections of their activations, for Fig. 1, Fig. 6 and the page.

{role}.projections.json   role, layers, vectors; per trace its id, category, problem and tokens, where sections start,
                          which tokens the experiment's window reads, and values[layer][vector][token]
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax import extract
from backtrack_jax.analysis.base import Material
from backtrack_jax.data.records import Trace
from backtrack_jax.files import store


def file_name(role: str) -> str:
    """Name of the file of a model's projections."""
    return f"{role}.projections.json"


def read(folder: Path, role: str) -> dict[str, Any]:
    """The projections of a model; see the module for its fields."""
    return store.read_json(folder / file_name(role))


def write(folder: Path, projected: dict[str, Any]) -> None:
    """Writes the projections of a model."""
    text = json.dumps(projected, ensure_ascii=False)
    store.write_text(folder / file_name(projected["role"]), text + "\n")


def project(
    material: Material,
    role: str,
    traces: Sequence[Trace],
    read_as: Sequence[extract.TokenTrace],
    centred: Sequence[np.ndarray],
    layers: Sequence[int],
) -> dict[str, Any]:
    """Projections of the tokens of some traces on every unit direction: the experiment's label first.

    Args:
      material: with the vectors.
      role: of the model.
      traces: the traces.
      read_as: each of them as the model reads it.
      centred: activations of all tokens of each reply, less the mean of many traces, [tokens, layers, D].
      layers: that these are of.
    """
    e = material.experiment
    names = [(source, label) for label in e.shown_vectors(material.labels) for source in e.roles]
    names = [name for name in names if name in material.vectors]
    units = [[material.vectors[name].unit(layer) for name in names] for layer in layers]
    shown = []
    for trace, tokens, states in zip(traces, read_as, centred, strict=True):
        values = [[states[:, n] @ unit for unit in of_layer] for n, of_layer in enumerate(units)]
        shown.append(
            {
                "id": trace.id,
                "category": trace.category,
                "problem": trace.problem,
                "tokens": _pieces(material, tokens),
                "starts": [[label, at - tokens.reply_start] for label, at in tokens.starts],
                "read": _read_in_reply(material, tokens),
                "values": [[[round(float(x), 3) for x in row] for row in rows] for rows in values],
            }
        )
    return {
        "role": role,
        "layers": list(layers),
        "vectors": [{"source": source, "label": label} for source, label in names],
        "traces": shown,
    }


def _read_in_reply(material: Material, trace: extract.TokenTrace) -> list[int]:
    """Tokens of a reply that a window of the experiment's label reads."""
    v = material.experiment.vectors
    windows = [
        extract.read_positions(trace, at, v.window, v.into_prompt) for label, at in trace.starts if label == v.label
    ]
    read = {at - trace.reply_start for window in windows for at in window or ()}
    return sorted(at for at in read if at >= 0)


def _pieces(material: Material, trace: extract.TokenTrace) -> list[str]:
    """Text of each reply token; a character of several tokens stands with the first of them."""
    text, spans = material.tokenizer.decode_with_spans(trace.ids[trace.reply_start :])
    pieces, end = [], 0
    for start, stop in spans:
        pieces.append(text[max(start, end) : stop])
        end = max(end, stop)
    return pieces
