"""Compiles sampling and reading for a TPU that need not be here, and says what memory they take on each of its chips.

    pip install -e '.[tpu]'      libtpu's compiler runs on any Linux machine with an x86-64 processor
    python scripts/compile_for_tpu.py --preset=llama-3.1-8b --topology=v5p:2x2x1 --chips=1
    python scripts/compile_for_tpu.py --preset=llama-3.1-8b --topology=v5e:2x2 --chips=4 --model_parallel=4
    python scripts/compile_for_tpu.py --config_json=FOLDER/config.json --rows=64 --prompt_tokens=256 --new_tokens=500

Prints one JSON line per program: GB of 1e9 bytes on each chip for what is given (the weights, above all) and for what
is computed on the way, seconds of compilation, and how often a pass through a block copies that block's part of the
cache; a decode step that reads the cache where it lies copies it never.
"""

import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu compiles; it is not asked for chips
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor a cloud for its machine

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from make_random_checkpoint import PRESETS

from backtrack_jax import extract, generate
from backtrack_jax.intervention import no_intervention, stack_rows
from backtrack_jax.models.config import LlamaConfig
from backtrack_jax.models.llama import Llama
from backtrack_jax.models.sharding import DATA, batch_sharding, make_mesh, shardings

FLAGS = flags.FLAGS
flags.DEFINE_string("topology", "v5p:2x2x1", "Kind and shape of the slice, as libtpu calls it.")
flags.DEFINE_integer("chips", 1, "Chips of the slice that are used.", lower_bound=1)
flags.DEFINE_integer("model_parallel", 1, "Chips that one copy of the weights is spread over.", lower_bound=1)
flags.DEFINE_integer("rows", 128, "Rows of a sampled batch.", lower_bound=1)
flags.DEFINE_integer("prompt_tokens", 128, "Tokens of a padded prompt.", lower_bound=1)
flags.DEFINE_integer("new_tokens", 128, "Tokens sampled.", lower_bound=1)
flags.DEFINE_integer("read_rows", 16, "Traces of a batch that is read.", lower_bound=1)
flags.DEFINE_integer("read_tokens", 1024, "Tokens of a padded trace.", lower_bound=1)
GROUPS, WINDOWS = 9, 7  # of the paper's plan


def main(argv: list[str]) -> None:
    if len(argv) > 1 or (FLAGS.preset is None) == (FLAGS.config_json is None):
        raise app.UsageError("give one of --preset and --config_json, and no other arguments")
    config = PRESETS[FLAGS.preset] if FLAGS.preset else LlamaConfig.from_file(Path(FLAGS.config_json))
    jax.default_backend = lambda: "tpu"  # the package asks, and does some things otherwise on a CPU
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name=FLAGS.topology)
    mesh = make_mesh(FLAGS.model_parallel, slice_.devices[: FLAGS.chips])
    model = placed_model(config, mesh)
    for name, lower in {"sample": lower_sampling, "read": lower_reading}.items():
        print(json.dumps({"program": name} | measure(lower(model, mesh), config, mesh)), flush=True)


def placed_model(config: LlamaConfig, mesh: Mesh) -> Llama:
    """The model in bfloat16 without its weights, each of them placed."""
    model = nnx.eval_shape(lambda: Llama(config, jnp.dtype(jnp.bfloat16), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    nnx.replace_by_pure_dict(state, jax.tree.map(place, nnx.to_pure_dict(state), shardings(config, mesh)))
    return nnx.merge(graphdef, state)


def lower_sampling(model: Llama, mesh: Mesh) -> Any:
    """Steered sampling with temperature, as a batch of `generate_rows`."""
    n, shape = FLAGS.rows, (FLAGS.rows, FLAGS.prompt_tokens)
    rows = lambda: stack_rows([no_intervention(model.config.n_layers, model.config.d_model)] * n)  # noqa: E731
    keys = lambda: jax.random.split(jax.random.key(0), n)  # noqa: E731
    batch = (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32), jax.eval_shape(keys), jax.eval_shape(rows))
    sampling = generate.Sampling(jnp.float32(1), jnp.float32(1), jnp.int32(0))
    values = abstract((sampling, jnp.zeros(2, jnp.int32)), NamedSharding(mesh, PartitionSpec()))
    return generate.compiled_generate.lower(
        model, *abstract(batch, rows_sharding(mesh, n)), *values, max_new_tokens=FLAGS.new_tokens
    )


def lower_reading(model: Llama, mesh: Mesh) -> Any:
    """Window sums of one batch of traces."""
    n, length = FLAGS.read_rows, FLAGS.read_tokens
    ids, reads, scale = (n, length), (n, GROUPS, WINDOWS, length), (n, GROUPS, WINDOWS)
    batch = [jnp.zeros(ids, jnp.int32), jnp.zeros(ids, jnp.int32), *map(jnp.zeros, (reads, scale, ids))]
    layers = abstract(jnp.zeros(1, jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return extract._contract.lower(model, *abstract(batch, rows_sharding(mesh, n)), layers)


def rows_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """As `place_rows`: a batch that the copies do not divide is left to each of them whole."""
    return NamedSharding(mesh, PartitionSpec()) if rows % mesh.shape[DATA] else batch_sharding(mesh)


def abstract(values: Any, sharding: NamedSharding) -> Any:
    """Shapes and dtypes, placed."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), values)


def measure(lowered: Any, config: LlamaConfig, mesh: Mesh) -> dict[str, Any]:
    """Compiles, and looks at what came of it."""
    start = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "given_gb": round(memory.argument_size_in_bytes / 1e9, 2),
        "on_the_way_gb": round(memory.temp_size_in_bytes / 1e9, 2),
        "compile_s": round(time.perf_counter() - start, 1),
        "cache_copies_per_block": cache_copies(compiled.as_text(), config, mesh),
    }


def cache_copies(program: str, config: LlamaConfig, mesh: Mesh) -> int:
    """Operations inside loops that write as much as one block's keys of a whole batch into a chip's main memory."""
    rows = FLAGS.rows // (1 if FLAGS.rows % mesh.shape[DATA] else mesh.shape[DATA])
    heads, slots = config.n_kv_heads // FLAGS.model_parallel, FLAGS.prompt_tokens + FLAGS.new_tokens
    size = math.prod((rows, heads, slots, config.head_dim))
    bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    found = 0
    for computation in re.split(r"\n(?=%|ENTRY)", program):
        if computation.lstrip("%").split(" ", 1)[0] in bodies:
            results = re.findall(r"= bf16\[([\d,]+)\](\S*) (?!get-tuple-element|parameter|bitcast)\w", computation)
            written = [shape for shape, layout in results if "S(1)" not in layout]  # space 1 is the core's own memory
            found += sum(math.prod(map(int, shape.split(","))) == size and str(slots) in shape for shape in written)
    return found


if __name__ == "__main__":
    app.run(main)
