"""Measures the claims of the paper on the small pair, and the truth that no larger pair can give.

    python scripts/organism_claims.py                                       # the pair that ships with the program
    python scripts/organism_claims.py --pairs results/pair2 results/pair3   # others, from scripts/train_organism.py

Layer, magnitude and single offset are chosen on one set of problems; every rate that is reported is of another set.
Vectors are read from replies to a third set. Tables go to `OUT/NAME.md` and `OUT/NAME.json`; magnitudes are shares of
the reasoning model's mean residual norm at the layer. The last thing printed is one table of all pairs measured so far.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backtrack_jax.files import store
from backtrack_jax.files.console import ends_in_one_line
from backtrack_jax.intervention import Intervention, add_vector, gaussian_noise, no_intervention, self_amplify
from backtrack_jax.models import checkpoint
from backtrack_jax.organism import corpus, measure
from backtrack_jax.organism.measure import Cell, Pair, cosines, unit

VERSION = 1  # of what is measured
TRACES, CHOOSING, REPORTING = (1000, 101), (48, 102), (80, 104)  # how many problems, seed of these and of replies
MAGNITUDES = (0.05, 0.1, 0.2, 0.3, 0.45)
GRID = (0.15, 0.2, 0.3)
OFFSETS = (-24, -20, -16, -12, -8, -4, 0, 4)
COHERENT = 0.90  # share of sentences that must fit the grammar
MARGIN = 0.02  # by which it must be exceeded on the choosing problems


class Directions:
    """Everything that is added, as [L, D] arrays, and the scale of magnitudes."""

    def __init__(self, pair: Pair):
        """Samples traces and reads both models over them."""
        traces = pair.traces(corpus.problems(*TRACES), seed=TRACES[1])
        read = pair.read(traces, seed=TRACES[1])
        found = sum(label == "backtracking" for trace in read for label, _ in trace.starts)
        if found < measure.FEWEST_WINDOWS:
            raise ValueError(
                f"{found} backtracking sentences in {len(traces)} replies of the reasoning model, expected at least "
                f"{measure.FEWEST_WINDOWS} to read a vector from"
            )
        sums = {role: measure.window_sums(pair, role, read, OFFSETS) for role in pair.models}
        self.labels = {role: measure.label_vectors(sums[role]) for role in sums}
        self.counts = {g: int(n) for g, n in zip(sums["base"].plan.groups, sums["base"].read[:, 0], strict=True)}
        self.offsets = {
            offset: sums["base"].mean("backtracking", (offset, offset)) - sums["base"].mean("all", (offset, offset))
            for offset in OFFSETS
        }
        self.norms = sums["reasoning"].mean_norm
        self.belief = {role: measure.belief(pair, role, traces, read) for role in pair.models}
        self.n_layers, self.d_model = pair.shape

    def add(self, direction: np.ndarray, layer: int, magnitude: float) -> Intervention:
        """Adds a layer's direction, scaled to a share of the mean residual norm."""
        length = magnitude * self.norms[layer]
        return add_vector(jnp.float32(unit(direction[layer])), layer, length, n_layers=self.n_layers)


def choose(pair: Pair, d: Directions) -> dict[str, Any]:
    """Layer and magnitude of the base-derived vector, and then the best single offset, on the choosing problems."""
    problems = corpus.problems(*CHOOSING)
    vector = d.labels["base"]["backtracking"]
    grid = {f"{layer} {m}": d.add(vector, layer, m) for layer in range(d.n_layers) for m in GRID}
    cells = pair.cells("reasoning", problems, grid, seed=CHOOSING[1])
    coherent = {name: cell for name, cell in cells.items() if cell.fitting >= COHERENT + MARGIN}
    if not coherent:
        most = max(cell.fitting for cell in cells.values())
        raise ValueError(
            f"no layer and magnitude of {', '.join(map(str, GRID))} keeps {100 * (COHERENT + MARGIN):g} % of sentences "
            f"within the grammar, {100 * most:.1f} % at most: there is nothing to report on"
        )
    best = max(coherent, key=lambda name: coherent[name].rate)
    layer, magnitude = int(best.split()[0]), float(best.split()[1])
    at_offsets = {str(offset): d.add(d.offsets[offset], layer, magnitude) for offset in OFFSETS}
    offset_cells = pair.cells("reasoning", problems, at_offsets, seed=CHOOSING[1])
    offset = int(max(offset_cells, key=lambda name: offset_cells[name].rate))
    return {"layer": layer, "magnitude": magnitude, "offset": offset, "cells": cells, "offset cells": offset_cells}


def conditions(d: Directions, layer: int, magnitude: float) -> dict[str, Intervention]:
    """What is added to the reasoning model on the reporting problems."""
    made = {"unsteered": no_intervention(d.n_layers, d.d_model)}
    for source, labels in d.labels.items():
        for m in MAGNITUDES:
            made[f"{source} v {m}"] = d.add(labels["backtracking"], layer, m)
        made[f"{source} -v"] = d.add(-labels["backtracking"], layer, magnitude)
        for label, vector in labels.items():
            if label != "backtracking":
                made[f"{source} {label}"] = d.add(vector, layer, magnitude)
        made[f"{source} true belief"] = d.add(d.belief[source].direction, layer, magnitude)
        made[f"{source} true log-odds"] = d.add(d.belief[source].log_odds_direction, layer, magnitude)
    for name, build in (("base v", d.labels["base"]), ("reasoning v", d.labels["reasoning"])):
        made[f"{name} chosen"] = d.add(build["backtracking"], layer, magnitude)
    length, L, D = magnitude * d.norms[layer], d.n_layers, d.d_model
    for draw in range(5):
        made[f"noise {draw}"] = gaussian_noise(layer, length, jax.random.key(draw), n_layers=L, d_model=D)
        fixed = np.random.default_rng(draw).standard_normal((d.n_layers, d.d_model))
        made[f"random direction {draw}"] = d.add(fixed, layer, magnitude)
    made["self-amplification"] = self_amplify(layer, length, n_layers=L, d_model=D)
    for other in range(d.n_layers):
        for m in GRID:
            made[f"layer {other} {m}"] = d.add(d.labels["base"]["backtracking"], other, m)
    for offset in OFFSETS:
        made[f"offset {offset}"] = d.add(d.offsets[offset], layer, magnitude)
    return made


def measure_pair(pair: Pair) -> dict[str, Any]:
    """Everything that is reported of a pair."""
    d = Directions(pair)
    say(f"windows read: {d.counts}")
    chosen = choose(pair, d)
    layer, magnitude = chosen["layer"], chosen["magnitude"]
    say(f"chosen: layer {layer}, magnitude {magnitude}, offset {chosen['offset']}")
    problems = corpus.problems(*REPORTING)
    cells = pair.cells("reasoning", problems, conditions(d, layer, magnitude), seed=REPORTING[1])
    say("steered the reasoning model")
    of_base = {"unsteered": no_intervention(d.n_layers, d.d_model)} | {
        f"{source} v {m}": d.add(d.labels[source]["backtracking"], layer, m) for source in d.labels for m in MAGNITUDES
    }
    base_cells = pair.cells("base", problems, of_base, seed=REPORTING[1])
    words = [i for i in range(256, pair.tokenizer.vocab_size) if i not in pair.tokenizer.markers.values()]
    keywords = [pair.tokenizer.encode(word)[0] for word in (" Wait", " Hmm")]
    v = {role: d.labels[role]["backtracking"] for role in d.labels}
    lens = {role: measure.keyword_lens(pair.models[role], v[role], keywords, words) for role in v}
    return {
        "layer": layer,
        "magnitude": magnitude,
        "offset": chosen["offset"],
        "windows": d.counts,
        "residual norm": d.norms.tolist(),
        "choosing": {name: dataclasses.asdict(c) for name, c in chosen["cells"].items()},
        "choosing offsets": {name: dataclasses.asdict(c) for name, c in chosen["offset cells"].items()},
        "reasoning model": {name: dataclasses.asdict(c) for name, c in cells.items()},
        "base model": {name: dataclasses.asdict(c) for name, c in base_cells.items()},
        "lens": {role: {"excess": e.tolist(), "spread": s.tolist()} for role, (e, s) in lens.items()},
        "cosine of the two vectors": cosines(v["base"], v["reasoning"]).tolist(),
        "cosine with true belief": {role: cosines(v[role], d.belief[role].direction).tolist() for role in v},
        "cosine with true log-odds": {role: cosines(v[role], d.belief[role].log_odds_direction).tolist() for role in v},
        "offset cosine with true belief": {
            str(offset): cosines(vector, d.belief["base"].direction).tolist() for offset, vector in d.offsets.items()
        },
        "probe R2": {role: d.belief[role].r_squared.tolist() for role in v},
        "probe R2 of log-odds": {role: d.belief[role].log_odds_r_squared.tolist() for role in v},
        "probe tokens": {role: d.belief[role].tokens for role in v},
    }


def claims(found: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(what must hold, what was measured, whether it does), in the order of the paper."""
    on = {name: Cell(**c) for name, c in found["reasoning model"].items()}
    base = {name: Cell(**c) for name, c in found["base model"].items()}
    layer, L = found["layer"], len(found["residual norm"])
    plain, v, w = on["unsteered"], on["base v chosen"], on["reasoning v chosen"]
    controls = {
        name: c
        for name, c in on.items()
        if name.startswith(("noise", "random", "self", "base ", "reasoning "))
        and not name.endswith(("chosen", "true belief", "true log-odds", "-v"))
        and " v " not in name
    }
    worst = max(controls, key=lambda name: controls[name].high)
    top_base = max((c for name, c in base.items() if " v " in name), key=lambda c: c.rate)
    by_layer = [
        max((c.rate for m in GRID if (c := on[f"layer {other} {m}"]).fitting >= COHERENT), default=0.0)
        for other in range(L)
    ]
    best_layer = int(np.argmax(by_layer))
    at = {offset: on[f"offset {offset}"] for offset in OFFSETS}
    best, zero = at[found["offset"]], at[0]
    z = {role: np.array(lens["excess"]) / np.array(lens["spread"]) for role, lens in found["lens"].items()}
    excess = np.array(found["lens"]["reasoning"]["excess"])
    cosine = found["cosine of the two vectors"][layer]
    truth, log_odds = (
        {role: found[f"cosine with true {what}"][role][layer] for role in ("base", "reasoning")}
        for what in ("belief", "log-odds")
    )
    return [
        ("unsteered rate 0.2 to 1 %", show(plain), 0.002 <= plain.rate <= 0.01),
        (
            "base-derived v on the reasoning model: at least 5 x unsteered, at least 90 % of sentences fit",
            f"{show(v)}, {times(v, plain)}, {100 * v.fitting:.1f} % fit",
            v.rate >= 5 * plain.rate and v.fitting >= COHERENT,
        ),
        (
            "reasoning-derived v comparably (0.5 to 2 times that)",
            f"{show(w)}, {times(w, plain)}, {100 * w.fitting:.1f} % fit",
            0.5 * v.rate <= w.rate <= 2 * v.rate,
        ),
        ("both on the base model: below 0.05 %", f"at most {show(top_base)}", top_base.rate < 0.0005),
        (
            "every control of equal norm at most half of the effect, interval included",
            f"highest: {worst} {show(controls[worst])}; half of v: {50 * v.rate:.2f} %",
            controls[worst].high <= v.rate / 2,
        ),
        (
            "-v lowers the rate",
            f"{show(on['base -v'])}, reasoning-derived {show(on['reasoning -v'])}",
            max(on["base -v"].high, on["reasoning -v"].high) < plain.low,
        ),
        (
            "best single offset negative, offset 0 clearly lower",
            f"offset {found['offset']}: {show(best)}; offset 0: {show(zero)}",
            found["offset"] < 0 and zero.high < best.low,
        ),
        (
            f"best layer before the last third (0 to {math.ceil(L * 2 / 3) - 1})",
            f"chosen {layer}; on the reporting problems {best_layer}; "
            + ", ".join(f"{100 * rate:.1f}" for rate in by_layer)
            + " %",
            max(layer, best_layer) < L * 2 / 3,
        ),
        (
            "logit lens: base-derived z within -1.5 and 1.5 at every layer",
            values(z["base"]),
            bool(np.abs(z["base"]).max() < 1.5),
        ),
        ("logit lens: reasoning-derived z rises with the layer", values(z["reasoning"]), rises(z["reasoning"])),
        ("logit lens: the same before it is divided by the words' spread (Eq. 2)", values(excess), rises(excess)),
        ("cosine of the two vectors 0.6 to 0.95", f"{cosine:.3f}", 0.6 <= cosine <= 0.95),
        (
            "cosine with the direction of the true belief, a probability, at least 0.8",
            ", ".join(f"{role} {value:.3f}" for role, value in truth.items()),
            min(truth.values()) >= 0.8,
        ),
        (
            "the same with the direction of its log-odds",
            ", ".join(f"{role} {value:.3f}" for role, value in log_odds.items()),
            min(log_odds.values()) >= 0.8,
        ),
    ]


def values(per_layer: np.ndarray) -> str:
    return ", ".join(f"{value:.1f}" for value in per_layer)


def rises(per_layer: np.ndarray) -> bool:
    """Whether each of the last three layers is above all of the first three."""
    return bool(per_layer[-3:].min() > per_layer[:3].max())


def overview(pairs: Mapping[str, Mapping[str, Any]]) -> str:
    """Every claim on every pair that was measured so far."""
    lines = [f"| claim | {' | '.join(pairs)} |", "|---" * (1 + len(pairs)) + "|"]
    for row in zip(*map(claims, pairs.values()), strict=True):
        cells = (f"{'yes' if holds else '**no**'}: {value}" for _, value, holds in row)
        lines.append(f"| {row[0][0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show(c: Cell) -> str:
    """Rate and interval in %."""
    return f"{100 * c.rate:.2f} % ({100 * c.low:.2f} to {100 * c.high:.2f})"


def times(c: Cell, plain: Cell) -> str:
    """A rate in units of the unsteered one."""
    return f"{c.rate / plain.rate:.1f} x" if plain.rate else "unsteered 0"


def markdown(found: Mapping[str, Any], name: str) -> str:
    """The tables of one pair."""
    lines = [
        f"### {name}: layer {found['layer']}, magnitude {found['magnitude']} of the mean residual norm "
        f"({found['residual norm'][found['layer']]:.1f})",
        "",
        "| claim | measured | holds |",
        "|---|---|---|",
        *(f"| {claim} | {value} | {'yes' if holds else 'no'} |" for claim, value, holds in claims(found)),
        "",
        "| condition, on the reasoning model | wait or hmm, % of words | sentences that fit, % |",
        "|---|---|---|",
    ]
    cells = {name: Cell(**c) for name, c in found["reasoning model"].items()}
    lines += [f"| {name} | {show(c)} | {100 * c.fitting:.1f} |" for name, c in cells.items()]
    columns = {
        "cosine of the two": found["cosine of the two vectors"],
        **of_roles("{} v, belief", found["cosine with true belief"]),
        **of_roles("{} v, log-odds", found["cosine with true log-odds"]),
        **of_roles("R2 of the belief, {}", found["probe R2"]),
        **of_roles("R2 of log-odds, {}", found["probe R2 of log-odds"]),
        **of_roles("{} lens, excess", {role: lens["excess"] for role, lens in found["lens"].items()}),
        **of_roles("{} lens, spread", {role: lens["spread"] for role, lens in found["lens"].items()}),
    }
    lines += ["", *layer_table("layer", columns)]
    lines += ["", *layer_table("layer; base v of one offset, belief", found["offset cosine with true belief"])]
    return "\n".join(lines) + "\n"


def of_roles(title: str, of: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of both models, their names put into the title."""
    return {title.format(role): of[role] for role in ("base", "reasoning")}


def layer_table(corner: str, columns: Mapping[str, list[float]]) -> list[str]:
    """A table of one row a layer."""
    lines = [f"| {' | '.join([corner, *columns])} |", "|---" * (1 + len(columns)) + "|"]
    for layer, row in enumerate(zip(*columns.values(), strict=True)):
        lines.append(f"| {layer} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    return lines


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def weights_of(folder: Path) -> dict[str, str]:
    """What tells a pair from others."""
    return {role: store.weights_hash(folder / role) for role in ("base", "reasoning")}


def read_tables(out: Path) -> dict[str, dict[str, Any]]:
    """Name -> what was measured of a pair by this version; says which files are of another."""
    tables = {file.stem: store.read_json(file) for file in sorted(out.glob("*.json"))}
    if others := [name for name, table in tables.items() if table.get("version") != VERSION]:
        say(f"not read, since another version of this program wrote them: {', '.join(others)} in {out}")
    return {name: table for name, table in tables.items() if name not in others}


def measure_pairs(pairs: Mapping[str, Path], out: Path) -> None:
    """Writes the tables of every pair, and prints that of all that are in the folder.

    Raises:
      ValueError: a table there is of another pair of that name; or names the pairs that have nothing to measure, once
        the others are done.
    """
    weights = {name: weights_of(folder) for name, folder in pairs.items()}
    for name, table in read_tables(out).items():
        if table["weights"] != weights.get(name, table["weights"]):
            raise ValueError(f"{out / name}.json is of another pair of that name; expected another --out")
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, folder in pairs.items():
        start = time.monotonic()
        try:
            found = {"version": VERSION, "weights": weights[name]} | measure_pair(Pair(folder))
        except ValueError as error:
            failed.append(f"{name}: {error}")
            continue
        store.write_text(out / f"{name}.md", markdown(found, name))
        store.write_text(out / f"{name}.json", json.dumps(found, indent=1) + "\n")
        say(f"{name}: {time.monotonic() - start:.0f} s")
    if everything := read_tables(out):
        print(overview(everything))
    if failed:
        raise ValueError("; ".join(failed))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, nargs="+", default=[checkpoint.resolve("package:backtrack_jax/organism")])
    parser.add_argument("--out", type=Path, default=Path("results/organism_claims"))
    arguments = parser.parse_args(argv)
    for folder in arguments.pairs:
        if missing := [role for role in ("base", "reasoning") if not (folder / role / "model.safetensors").exists()]:
            parser.error(
                f"--pairs: {folder} has no {' and '.join(missing)} model; train_organism.py --out makes a pair"
            )
    names = [folder.resolve().name for folder in arguments.pairs]
    if len(set(names)) < len(names):
        parser.error(f"--pairs: folders are named {', '.join(names)}, and tables after them; expected different names")
    resumed = "pairs that are measured have their tables; name the others again"
    with ends_in_one_line(remedy="run it again where more is free", resumed=resumed):
        measure_pairs(dict(zip(names, arguments.pairs, strict=True)), arguments.out.expanduser())


if __name__ == "__main__":
    main()
