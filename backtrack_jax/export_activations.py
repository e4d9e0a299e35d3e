"""Activations of the same tokens in both models, in files that the training of a crosscoder reads.

    python -m backtrack_jax.export_activations --config=configs/smollm2.py --out=activations --layers=10

Traces and annotations of the run are made first where they are not there. Then every trace is read by one model after
the other, and the outputs of the chosen blocks are written shard by shard:

    index.json                             shapes, layers, models, traces and labels, and whether it is complete
    index-00001.safetensors                for every token: trace, token id, label, reply, position in each model
    {role}/activations-00001.safetensors   `activations` [tokens, layers, D]

A token that a model does not read, or reads as another one, is in no file: row j of one model's shard is the same token
as row j of the other's. Position 0 and padding are left out. A killed command loses at most one shard, and the same
command then goes on; the files are the same bytes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import app, flags

from backtrack_jax import inputs, pipeline
from backtrack_jax.analysis import activations
from backtrack_jax.checks import check
from backtrack_jax.data import records
from backtrack_jax.extract import TokenTrace
from backtrack_jax.files import store
from backtrack_jax.files.console import Progress, ends_in_one_line, say
from backtrack_jax.models.safetensors import read_header
from backtrack_jax.run import CONFIG, WORKDIR, divide_cpu, parse_flags, silence_routine_messages
from backtrack_jax.stages.annotations import ANNOTATIONS, read_pairs
from backtrack_jax.stages.base import Context
from backtrack_jax.stages.traces import TRACES

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
CONVENTION = "layer l is the output of block l, counted from 0: blocks.l.hook_resid_post of TransformerLens"
_INDEX = "index.json"
_FORMAT = 1

# Other commands have a flag of this name too; a process that imports several runs one of them.
_OUT = flags.DEFINE_string("out", "", "Folder for the activations.", allow_override=True)
_LAYERS = flags.DEFINE_list("layers", [], "Blocks, 0-based; default vectors.layers, or steering.layer without any.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of the activations in the files.")
_TOKENS = flags.DEFINE_integer("shard_tokens", 16384, "Tokens after which a shard ends, with the trace they are in.")


def main(argv: Sequence[str]) -> None:
    """Writes the activations that the flags describe."""
    silence_routine_messages()
    with ends_in_one_line(
        remedy="lower vectors.batch_size and run again",
        resumed="the same command resumes where this one left off",
    ):
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}; overrides look like --config.vectors.batch_size=4")
        if not _OUT.value:
            raise ValueError("--out='', expected a folder for the activations")
        if not all(layer.strip().isdecimal() for layer in _LAYERS.value):
            raise ValueError(
                f"--layers={','.join(_LAYERS.value)}, expected blocks as whole numbers, such as 10 or 10,19"
            )
        experiment = CONFIG.value
        if WORKDIR.value:
            experiment.workdir = WORKDIR.value
        check(experiment)
        divide_cpu(experiment.data_parallel * experiment.model_parallel)
        layers = [int(layer) for layer in _LAYERS.value]
        run = pipeline.Run(experiment.for_vectors(), (TRACES.name, ANNOTATIONS.name))
        export(run, Path(_OUT.value).expanduser(), layers=layers, dtype=_DTYPE.value, shard_tokens=_TOKENS.value)


def export(
    run: pipeline.Run,
    out: Path,
    *,
    layers: Sequence[int] = (),
    dtype: str = "bfloat16",
    shard_tokens: int = 16384,
) -> None:
    """Writes the activations of all annotated traces, or what an earlier call has not written of them.

    At most one shard is held in memory, in float32: `shard_tokens` and the rest of a trace, times layers times D.

    Args:
      run: of the experiment, stages 1 and 2.
      out: folder of the files.
      layers: blocks, 0-based; empty for `vectors.layers`, or `steering.layer` where that is empty.
      dtype: one of `DTYPES`.
      shard_tokens: tokens after which a shard ends, with the trace that they are in.

    Raises:
      ValueError: a layer that a model does not have, no tokens that all models read, or the folder holds activations
        under other settings; names them.
      FloatingPointError: an activation is not finite in this dtype; names the model and the layer.
    """
    e = run.experiment
    layers = list(dict.fromkeys(layers or e.vectors.layers or (e.steering.main_layer,)))
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}, expected one of {', '.join(DTYPES)}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens}, expected at least 1")
    run.run()
    context, pairs = run.context, read_pairs(run.context)
    shapes = {role: (config.n_layers, config.d_model) for role in e.roles for config in [context.architecture(role)]}
    for role, (n_layers, _) in shapes.items():
        if beyond := [layer for layer in layers if not 0 <= layer < n_layers]:
            raise ValueError(f"layers={layers}: {beyond[0]} is not a block of the {role} model, 0..{n_layers - 1}")
    labels = sorted({section.label for _, annotation in pairs for section in annotation.sections})
    tokens = [_aligned(context, trace, annotation, labels) for trace, annotation in pairs]
    shards = _shards([len(found["token"]) for found in tokens], shard_tokens)
    if not shards:
        raise ValueError(f"no token of the {len(pairs)} annotated traces is read by all models, expected some")
    settings = {
        "format": _FORMAT,
        "convention": CONVENTION,
        "layers": layers,
        "dtype": dtype,
        "shard_tokens": shard_tokens,
        "batch_size": e.vectors.batch_size,  # the last bits of an activation depend on it
        "models": {role: inputs.model_inputs(e, role) | {"path": e.model(role).path} for role in e.roles},
        "prompt": inputs.prompt_inputs(e),
        "d_model": {role: d_model for role, (_, d_model) in shapes.items()},
        "labels": labels,
        "traces": [[trace.id, trace.problem_id, trace.category] for trace, _ in pairs],
        "tokens_of_shards": [sum(len(tokens[i]["token"]) for i in shard) for shard in shards],
        "annotations": store.fingerprint(context.inputs[ANNOTATIONS.name]),
    }
    out.mkdir(parents=True, exist_ok=True)
    with store.locked(out):
        _claim(out, settings)
        for number, shard in enumerate(shards, 1):
            columns = {"trace": [np.full(len(tokens[i]["token"]), i, np.int32) for i in shard]}
            columns |= {name: [tokens[i][name] for i in shard] for name in tokens[0]}
            store.write_safetensors(
                out / f"index-{number:05}.safetensors",
                {name: np.concatenate(parts) for name, parts in columns.items()},
                {"format": "backtrack_jax.activations.v1"},
            )
        for role in context.roles_by_need():
            traces = [_read_by(context, role, trace) for trace, _ in pairs]
            _write_role(context, out / role, role, traces, tokens, shards, layers, DTYPES[dtype])
        store.write_text(out / _INDEX, _text(settings, complete=True))
    say(f"  {sum(settings['tokens_of_shards']):,} tokens of {len(pairs)} traces in {out}")


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Writes the index of a new folder; refuses one of other settings."""
    path = out / _INDEX
    if not path.exists():
        store.write_text(path, _text(settings, complete=False))
        return
    before = {name: value for name, value in store.read_json(path).items() if name not in ("complete", "fingerprint")}
    if different := store.changes(before, settings):
        raise ValueError(f"{out} holds activations under other settings ({', '.join(different)}); give another --out")


def _text(settings: dict[str, Any], *, complete: bool) -> str:
    whole = settings | {"fingerprint": store.fingerprint(settings), "complete": complete}
    return json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _write_role(
    context: Context,
    folder: Path,
    role: str,
    traces: Sequence[TokenTrace],
    tokens: Sequence[dict[str, np.ndarray]],
    shards: Sequence[Sequence[int]],
    layers: Sequence[int],
    dtype: np.dtype,
) -> None:
    """The shards of one model that are not there."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"activations-{number:05}.safetensors" for number in range(1, len(shards) + 1)]
    missing = [number for number, file in enumerate(files) if not (file.exists() and not read_header(file)[1])]
    size, column = context.experiment.vectors.batch_size, f"position_{role}"
    with Progress(f"  activations of the {role} model", len(shards), len(shards) - len(missing)) as progress:
        for number in missing:
            own = [traces[i] for i in shards[number]]
            at = [tokens[i][column].astype(np.int64) for i in shards[number]]
            found: dict[int, np.ndarray] = {}
            for batch in activations.read(context.model(role), own, at, layers, batch_size=size):
                found |= {i: _narrowed(values, dtype, f"{role} model", layers) for i, values in batch}
            values = np.concatenate([found[i] for i in range(len(own))])
            metadata = {"layers": json.dumps(list(layers)), "convention": CONVENTION, "role": role}
            store.write_safetensors(files[number], {"activations": values}, metadata)
            progress.update(1, len(values))


def _narrowed(values: np.ndarray, dtype: np.dtype, name: str, layers: Sequence[int]) -> np.ndarray:
    """[tokens, layers, D] in the dtype of the files."""
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
    bad = ~np.isfinite(narrow.astype(np.float32)).all((0, 2))
    if bad.any():
        raise FloatingPointError(
            f"{name}: an activation at layer {layers[int(np.argmax(bad))]} is not finite in {dtype.name}; "
            "bfloat16 and float32 have the range of the model"
        )
    return narrow


def _read_by(context: Context, role: str, trace: records.Trace) -> TokenTrace:
    encoded = context.reader(role).encoded(trace)
    return TokenTrace(trace.id, context.for_role(role, encoded.ids)[0], encoded.reply_start, ())


def _aligned(
    context: Context, trace: records.Trace, annotation: records.Annotation, labels: Sequence[str]
) -> dict[str, np.ndarray]:
    """The tokens that all models read alike but for position 0: id, label (-1: none), reply, and positions, int32."""
    encoded = context.reader(context.experiment.author).encoded(trace)  # the same of every role
    ids = np.array(encoded.ids)
    label = np.full(len(ids), -1, np.int32)
    for section in annotation.sections:
        blank = len(text := trace.text[section.start : section.stop]) - len(text.lstrip())
        if held := encoded.token_span(section.start + blank, section.stop):
            label[slice(*held)] = labels.index(section.label)
    kept = np.ones(len(ids), bool)
    positions = {}
    for role in context.experiment.roles:
        read, index = context.for_role(role, encoded.ids)
        same = np.array([index[i] > 0 and read[index[i]] == token for i, token in enumerate(encoded.ids)])
        kept &= same
        positions[f"position_{role}"] = index.astype(np.int32)
    columns = {"token": ids, "label": label, "reply": np.arange(len(ids)) >= encoded.reply_start, **positions}
    return {name: column[kept].astype(np.int32) for name, column in columns.items()}


def _shards(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of the traces of each shard, in their order; a shard ends with the trace that fills it."""
    shards: list[list[int]] = [[]]
    filled = 0
    for number, length in enumerate(lengths):
        if filled >= most:
            shards.append([])
            filled = 0
        if length:
            shards[-1].append(number)
            filled += length
    return [shard for shard in shards if shard]


def console() -> None:
    """The command line."""
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    console()
