"""What a run depends on: where its inputs are, and what tells one of them from another."""

import dataclasses
from typing import Any

from backtrack_jax import vectors
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.data.problems import problems_at, spread
from backtrack_jax.files import store
from backtrack_jax.files.paths import data_path, local_path
from backtrack_jax.models import checkpoint, families
from backtrack_jax.models.config import ModelConfig


def architecture(path: str) -> ModelConfig | None:
    """Architecture of a checkpoint on this machine, or of a well-known one on the hub; None where it is not known yet.

    Raises:
      ValueError: it is not a Llama that this program implements.
    """
    local = local_path(path)
    return checkpoint.read_config(local) if local.exists() else families.released(path)


def problems(e: Experiment) -> list[records.Problem]:
    """The problems that the author of sampled traces is asked."""
    return spread(problems_at(e.traces.problems), e.traces.limit)


def vector_files(e: Experiment, n_layers: int) -> dict[str, vectors.SteeringVector]:
    """The vectors of `steering.kinds` and `baselines` that are files, by their paths as in the config.

    Of a `.pt` dictionary the entry of `vectors.label` is taken; a single direction is that of `steering.layer`.

    Raises:
      FileNotFoundError, ValueError: names the file and what is wrong with it.
    """
    s = e.steering
    return {
        file: vectors.load(data_path(file), label=e.vectors.label, layer=s.main_layer, n_layers=n_layers)
        for file in s.vector_files
    }


def model_inputs(e: Experiment, role: str) -> dict[str, Any]:
    """What results depend on of the model of a role: its spec, and its weights by content."""
    fields = dataclasses.asdict(e.model(role))
    del fields["path"]
    fields["marker_replacement"] = fields["marker_replacement"] or -1  # as it was while it was an id
    return fields | {"weights": store.weights_id(e.model(role).path)}


def prompt_inputs(e: Experiment) -> dict[str, Any]:
    """What results depend on of the prompts: the format, and the tokenizer by content."""
    fields = dataclasses.asdict(e.prompt)
    if not fields["template_arguments"]:
        del fields["template_arguments"]  # which earlier results know nothing of
    return fields | {"tokenizer": store.weights_id(e.tokenizer_path)}
