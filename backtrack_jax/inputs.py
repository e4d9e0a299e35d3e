"""What a run depends on: where its inputs are, what tells them apart, and whether they fit together."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from backtrack_jax import vectors
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.data.problems import shipped_problems
from backtrack_jax.files import store
from backtrack_jax.files.paths import local_path
from backtrack_jax.kinds import parse
from backtrack_jax.models import checkpoint, families
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.sharding import check_parts
from backtrack_jax.models.tokenizer import Tokenizer

_T = TypeVar("_T")


def data_path(path: str) -> Path:
    """A file or folder of data, possibly inside an installed package; FileNotFoundError if there is none."""
    found = local_path(path)
    if not found.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return found


def weights_id(path: str) -> str:
    """What tells one checkpoint from another: content of a local one, else the hub id (the config has its revision)."""
    local = local_path(path)
    return store.weights_hash(local) if local.exists() else path


def architecture(path: str) -> ModelConfig | None:
    """Architecture of a checkpoint on this machine, or of a well-known one on the hub; None where it is not known yet.

    Raises:
      ValueError: it is not a Llama that this program implements.
    """
    local = local_path(path)
    return checkpoint.read_config(local) if local.exists() else families.released(path)


def problems(e: Experiment) -> list[records.Problem]:
    """The problems that the author of sampled traces is asked."""
    read = records.read_problems(data_path(e.traces.problems)) if e.traces.problems else shipped_problems()
    return spread(read, e.traces.limit)


def spread(items: Sequence[_T], limit: int) -> list[_T]:
    """`limit` items evenly spread over a sequence, all of them if limit is 0 or more than there are."""
    if not limit or limit >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


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
                    f"{field}={beyond[0]} is no block of the {role} model, {e.model(role).path}: "
                    f"it has blocks 0..{config.n_layers - 1}"
                )
        replacement = e.model(role).marker_replacement
        if replacement >= config.vocab_size:
            raise ValueError(
                f"{role}.marker_replacement={replacement} is no token of {e.model(role).path}: "
                f"its vocabulary has {config.vocab_size}"
            )
        _check_vector_files(e, role, config)
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


def _layer_fields(e: Experiment) -> dict[str, tuple[int, ...]]:
    s = e.steering
    return {"steering.layer": s.kind_layers, "steering.layers": s.layers, "vectors.layers": e.vectors.layers}


def check_planned(e: Experiment) -> None:
    """Refuses what is wrong with the models as far as it shows before they are fetched; see `check_architectures`.

    Raises:
      FileNotFoundError, ValueError: names the field and its value.
    """
    paths = {f"{role}.path": e.model(role).path for role in e.roles} | {"tokenizer": e.tokenizer_path}
    for field, path in paths.items():
        if not (local_path(path).exists() or checkpoint.is_hub_id(path)):
            raise FileNotFoundError(
                f"{field}={path!r}, expected a folder or .gguf file that exists, or a hub id owner/name"
            )
    for file in e.steering.vector_files:
        data_path(file)  # of models that are not here yet, nothing else can be checked
    check_architectures(e, {role: config for role in e.roles if (config := architecture(e.model(role).path))})


def check_fetched(e: Experiment, roles: Sequence[str]) -> None:
    """Fetches the models that are not here and refuses what is wrong with any of them, before weights are read.

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


def check_vocabulary(role: str, config: ModelConfig, tokenizer: Tokenizer, not_read: Collection[int]) -> None:
    """Refuses a tokenizer with ids beyond a model's embedding, which would be read as other tokens without a word.

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


def stage_inputs(e: Experiment) -> dict[str, dict[str, Any]]:
    """What the results of each stage depend on besides those of the stages before: config, and files by content.

    Where replies are sampled or read one by one, the size of a batch is left out, so that a run which met the end of
    memory goes on with smaller ones. Sums over traces can only be resumed in the same batches.
    """
    models = {role: _without(e.model(role), "path") | {"weights": weights_id(e.model(role).path)} for role in e.roles}
    prompt = dataclasses.asdict(e.prompt) | {"tokenizer": weights_id(e.tokenizer_path)}
    traces: dict[str, Any]
    if e.traces.path:
        # Of a folder what is read alone: results or a git repository in it would change it at every run.
        path = data_path(e.traces.path)
        files = {file.name if path.is_dir() else "": store.file_hash(file) for file in records.chain_files(path)}
        traces = {"traces": {"file": store.fingerprint(files), "limit": e.traces.limit}}
    else:
        asked = store.fingerprint({"problems": [dataclasses.asdict(problem) for problem in problems(e)]})
        sampling = _without(e.traces, "path", "stand_in", "problems", "limit", "batch_size") | {"problems": asked}
        traces = {"traces": sampling, "prompt": prompt, "model": models[e.author], "seed": e.seed}
    return {
        "1-traces": traces,
        "2-annotations": {"annotations": {"judge": e.judge} | _judge_inputs(e, e.judge)},
        "3-vectors": {"vectors": dataclasses.asdict(e.vectors), "models": models, "prompt": prompt},
        "4-steering": {
            "steering": _without(e.steering, "batch_size") | {"layer": _one_or_all(e.steering.kind_layers)},
            "vector_files": {file: store.file_hash(data_path(file)) for file in e.steering.vector_files},
            "seed": e.seed,
        },
        "5-analysis": {
            "analysis": _without(e.analysis, "batch_size"),
            "judge": _judge_inputs(e, e.analysis.judge),
        },
        "6-report": {"name": e.name},
    }


def _judge_inputs(e: Experiment, judge: str) -> dict[str, Any]:
    """What the labels depend on: of the online judge what is asked, not where, how fast or for how much."""
    spec = e.annotations
    if judge == "import":
        return {"file": store.file_hash(data_path(spec.path))}
    if judge == "keyword":
        return {"variant": spec.variant}
    if judge == "openai":
        asked = ("model", "temperature", "seed", "max_tokens", "extra_body", "votes", "reask")
        values = {name: getattr(spec.openai, name) for name in asked}
        return {"openai": values | {"prompt": spec.openai.prompt().hash}}
    return {}


def _without(spec: Any, *fields: str) -> dict[str, Any]:
    """Fields of a spec but for some; numbers as the field has them, so that 0 and 0.0 are the same magnitude."""
    kept = [field for field in dataclasses.fields(spec) if field.name not in fields]
    return {field.name: _as_declared(field.type, getattr(spec, field.name)) for field in kept}


def _one_or_all(values: Sequence[int]) -> int | list[int]:
    """A single value by itself, so that 10 and (10,) are the same inputs."""
    return values[0] if len(values) == 1 else list(values)


def _as_declared(kind: Any, value: Any) -> Any:
    if kind is float:
        return float(value)
    return [float(item) for item in value] if kind == tuple[float, ...] else value
