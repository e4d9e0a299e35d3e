"""What a run depends on: where its inputs are, and what tells one of them from another."""

import dataclasses
from typing import Any

import numpy as np

from backtrack_jax import sae_files, vectors
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.data.problems import problems_at, spread
from backtrack_jax.files import store
from backtrack_jax.files.paths import data_path, local_path
from backtrack_jax.kinds import sae_row
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
        file: sae_vector(*row, n_layers)
        if (row := sae_row(file))
        else vectors.load(data_path(file), label=e.vectors.label, layer=s.main_layer, n_layers=n_layers)
        for file in s.vector_files
    }


def sae_vector(folder: str, row: int, n_layers: int) -> vectors.SteeringVector:
    """A row of the decoder of a sparse autoencoder, as a vector that has a direction at its layer alone.

    Raises:
      FileNotFoundError, ValueError: names the folder and what is wrong with it.
    """
    sae = sae_files.load(data_path(folder), n_layers=n_layers)
    directions = np.full((n_layers, sae.d_model), np.nan, np.float32)
    try:
        directions[sae.layer] = sae.row(row)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return vectors.SteeringVector(directions, {"sae": folder, "row": row})


def vector_file_id(file: str) -> str:
    """What tells one vector file from another: its content; of a row of an autoencoder, that of the autoencoder."""
    row = sae_row(file)
    return store.weights_hash(data_path(row[0])) if row else store.file_hash(data_path(file))


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
