"""Whether models, tokenizer, vector files and config fit together, found before any long work."""

from collections.abc import Collection, Mapping, Sequence

from backtrack_jax import sae_files
from backtrack_jax.config import Experiment
from backtrack_jax.files.paths import local_path
from backtrack_jax.inputs import architecture, data_path, vector_files
from backtrack_jax.kinds import parse, sae_row
from backtrack_jax.models import checkpoint, prompts
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.sharding import check_parts
from backtrack_jax.models.tokenizer import Tokenizer


def check_architectures(e: Experiment, known: Mapping[str, ModelConfig]) -> None:
    """Refuses models that do not fit the config or each other.

    Args:
      e: the experiment.
      known: role -> architecture, of those that are known.

    Raises:
      ValueError: names the field, its value, and what the model has.
    """
    for role, config in known.items():
        for field, layers in _layer_fields(e).items():
            if beyond := [layer for layer in layers if layer >= config.n_layers]:
                raise ValueError(
                    f"{field}={beyond[0]} is not a block of the {role} model, {e.model(role).path}: "
                    f"it has blocks 0..{config.n_layers - 1}"
                )
        _check_vector_files(e, role, config)
        _check_sae(e, role, config)
        try:
            check_parts(config, e.model_parallel)
        except ValueError as error:
            raise ValueError(f"model_parallel={e.model_parallel}, {role} model: {error}") from error
    shapes = {(config.n_layers, config.d_model) for config in known.values()}
    if len(shapes) > 1:
        raise ValueError(
            "vectors of one model are added to the other, but (layers, width) differ: "
            + ", ".join(f"{role} {(config.n_layers, config.d_model)}" for role, config in known.items())
        )


def _check_vector_files(e: Experiment, role: str, config: ModelConfig) -> None:
    """Refuses vector files that the model of a role cannot be steered with."""
    for file, vector in vector_files(e, config.n_layers).items():
        if vector.directions.shape[1] != config.d_model:
            raise ValueError(
                f"{file} has directions of width {vector.directions.shape[1]}; the {role} model takes {config.d_model}"
            )
        of_kinds = any(file in parse(kind).names for kind in e.steering.kinds)
        try:
            for layer in e.steering.kind_layers if of_kinds else (e.steering.main_layer,):
                vector.unit(layer)
        except ValueError as error:
            raise ValueError(f"{file}: {error}, which is steering.layer") from error


def _check_sae(e: Experiment, role: str, config: ModelConfig) -> None:
    """Refuses an autoencoder that is not one of the model of a role."""
    if "sae" in e.questions.ask:
        try:
            sae_files.load(data_path(e.questions.sae.path), d_model=config.d_model, n_layers=config.n_layers)
        except ValueError as error:
            raise ValueError(f"questions.sae.path, {role} model: {error}") from error


def _layer_fields(e: Experiment) -> dict[str, tuple[int, ...]]:
    s = e.steering
    return {"steering.layer": s.kind_layers, "steering.layers": s.layers, "vectors.layers": e.vectors.layers}


def check_planned(e: Experiment) -> None:
    """Refuses models that are wrong, as far as that shows before they are fetched; see `check_architectures`.

    Raises:
      FileNotFoundError, ValueError: names the field and its value.
    """
    paths = {f"{role}.path": e.model(role).path for role in e.roles} | {"tokenizer": e.tokenizer_path}
    if "transfer" in e.questions.ask:
        paths["questions.transfer.model.path"] = e.questions.transfer.model.path
    for field, path in paths.items():
        if not (local_path(path).exists() or checkpoint.is_hub_id(path)):
            raise FileNotFoundError(
                f"{field}={path!r}, expected a folder or .gguf file that exists, or a hub id owner/name"
            )
    for file in e.steering.vector_files:
        data_path(
            row[0] if (row := sae_row(file)) else file
        )  # of models that are not here yet, nothing else can be checked
    check_architectures(e, {role: config for role in e.roles if (config := architecture(e.model(role).path))})


def check_fetched(e: Experiment, roles: Sequence[str]) -> None:
    """Fetches models that are not here, and refuses any that are wrong before weights are read.

    Args:
      e: the experiment.
      roles: of the models that are needed.

    Raises:
      FileNotFoundError, ValueError: names the model and what is wrong with it.
    """
    paths = {role: checkpoint.resolve(e.model(role).path, e.model(role).revision or None) for role in roles}
    for path in paths.values():
        checkpoint.check(path)
    check_architectures(e, {role: checkpoint.read_config(path) for role, path in paths.items()})


def check_markers(e: Experiment, role: str, config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Refuses a replacement for markers that is not one token which the model of a role knows.

    Args:
      e: the experiment.
      role: of the model.
      config: its architecture.
      tokenizer: the tokenizer of the experiment.

    Returns:
      Ids that this model never reads.

    Raises:
      ValueError: names the field, the text, and the tokens that it is.
    """
    spec = e.model(role)
    if spec.markers == "keep":
        return ()
    if spec.marker_replacement:
        try:
            replacement = prompts.replacement_id(tokenizer, spec.marker_replacement)
        except ValueError as error:
            raise ValueError(f"{role}.{error}") from error
        if replacement >= config.vocab_size:
            raise ValueError(
                f"{role}.marker_replacement={spec.marker_replacement!r} is the token {replacement}, which is not one "
                f"of {spec.path}: it embeds {config.vocab_size}"
            )
    return prompts.marker_ids(tokenizer)


def check_vocabulary(role: str, config: ModelConfig, tokenizer: Tokenizer, not_read: Collection[int]) -> None:
    """Refuses a tokenizer with ids beyond a model's embedding, which would silently be read as other tokens.

    Args:
      role: of the model.
      config: its architecture.
      tokenizer: the tokenizer of the experiment.
      not_read: ids that this model never reads.

    Raises:
      ValueError: names the highest such id.
    """
    highest = max(set(range(tokenizer.vocab_size)).difference(not_read))
    if highest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has token ids up to {highest}, the {role} model embeds {config.vocab_size}"
        )
