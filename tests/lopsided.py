"""The tiny experiment with nothing alike: what a mistake exchanges, drops or counts twice shows in every table.

Problems have one to three traces, which do not stand together and differ in length by more than a batch holds; one has
no labels. Layers are not numbered as they are kept, settings are not the defaults, no two counts are equal by design.
"""

import dataclasses
import json
import re
from pathlib import Path

import tiny

from backtrack_jax.config import Experiment

UNLABELLED = ("spatial_2", 1)  # task, and which of its chains


def get_config() -> Experiment:
    """Other settings than the defaults, wherever they differ in what is measured."""
    e = tiny.get_config()
    e.name, e.seed = "lopsided", 3
    e.base = dataclasses.replace(e.base, markers="replace", marker_replacement=" wait")
    e.vectors = dataclasses.replace(
        e.vectors, layers=(0, 2), offsets=(-6, 0), offset_window=(-1, 0), estimator="token_mean", contrast="rest"
    )
    e.steering = dataclasses.replace(
        e.steering,
        kinds=("backtracking", "deduction"),
        baselines=("noise",),
        offsets=(0,),
        layers=(1, 2),
        layer=(2,),
        magnitudes=(0.0, -0.3, 0.9),
        grid_magnitudes=(0.9,),
        unit="relative",
        limit=5,
        grid_limit=3,
        temperature=1.3,
    )
    e.analysis = dataclasses.replace(
        e.analysis,
        keywords=("hmm", "add"),
        horizons=(2, 9),
        positions=7,
        folds=3,
        shown=3,
        forced_texts=4,
        forced_sentences=2,
    )
    return e


def write(folder: Path) -> None:
    """As `tiny.write`, with other chains."""
    tiny.write(folder)
    (folder / tiny.CHAINS).write_text(json.dumps(chains(), indent=1), "utf-8")


def chains() -> list[dict[str, str]]:
    """The tiny chains, then for some a second one and a third, whose sections are turned round and repeated."""
    made = []
    for copy in range(3):
        for number, chain in enumerate(tiny.chains()):
            if copy > number % 3:
                continue
            chain |= {"problem": chain["problem"] + " Say it in two ways." * 2 * (number % 3)}
            if copy:
                found = re.findall(r'\["([\w-]+)"\](.*?)\["end-section"\]', chain["annotated_chain"])
                sections = (found[copy:] + found[:copy]) * (1 + number // 5)
                labelled = " ".join(f'["{label}"]{text}["end-section"]' for label, text in sections)
                own = (chain["task_id"], copy) != UNLABELLED
                chain |= {"reasoning_chain": "\n\n".join(text for _, text in sections)}
                chain |= {"annotated_chain": labelled if own else ""}
            made.append(chain)
    return made
