"""Compiles sampling and reading for a TPU or GPU that need not be here, and says what memory they take on each device.

    pip install -e '.[tpu]'      libtpu's compiler runs on any Linux machine with an x86-64 processor
    python scripts/compile_ahead.py --preset=llama-3.1-8b --topology=v5p:2x2x1 --chips=1
    python scripts/compile_ahead.py --preset=llama-3.1-8b --topology=v5e:2x2 --chips=4 --model_parallel=4
    python scripts/compile_ahead.py --preset=llama-3.1-8b --topology=v5e:2x2 --dtype=int8 --rows=32 --new_tokens=512
    python scripts/compile_ahead.py --config_json=FOLDER/config.json --rows=64 --prompt_tokens=256 --new_tokens=500
    pip install -e '.[cuda13]'   and so does XLA's for NVIDIA's GPUs; --memory_gb is what JAX may take of one
    python scripts/compile_ahead.py --preset=llama-3.1-8b --topology=h100 --memory_gb=60

Prints one JSON line per program: GB of 1e9 bytes on each device for what is given (the weights, above all) and for what
is computed on the way, seconds of compilation, GB that every block of a decode step copies out of the stacks that
hold all blocks' weights and caches, into main memory, and branches, inner loops and kernels of a decode step.
"""

import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler is not asked for devices
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor a cloud for its machine

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from hlo_loops import loop_counts
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from make_random_checkpoint import PRESETS

from backtrack_jax import extract, generate
from backtrack_jax.files.console import ends_in_one_line
from backtrack_jax.intervention import add_vector, stack_rows
from backtrack_jax.models import families, ops, quantized
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.sharding import DATA, batch_sharding, make_mesh, shardings

FLAGS = flags.FLAGS
flags.DEFINE_string("topology", "v5p:2x2x1", "Kind and shape of the TPU slice, as libtpu calls it; or h100.")
flags.DEFINE_integer("chips", 1, "Devices that are used.", lower_bound=1)
flags.DEFINE_integer("model_parallel", 1, "Devices that one copy of the weights is spread over.", lower_bound=1)
flags.DEFINE_float("memory_gb", 60, "Of a GPU, what JAX may take: three quarters, unless it is told otherwise.")
flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "int8"], "Of the weights, see ModelSpec.dtype.")
flags.DEFINE_integer("rows", 128, "Rows of a sampled batch.", lower_bound=1)
flags.DEFINE_integer("prompt_tokens", 128, "Tokens of a padded prompt.", lower_bound=1)
flags.DEFINE_integer("new_tokens", 128, "Tokens sampled.", lower_bound=1)
flags.DEFINE_integer("read_rows", 16, "Traces of a batch that is read.", lower_bound=1)
flags.DEFINE_integer("read_tokens", 1024, "Tokens of a padded trace.", lower_bound=1)
GROUPS, WINDOWS, TOKENS_OF_SECTION = 9, 7, 17  # of the paper's plan; a section is a sentence or more
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84942979072
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"  runtime_version { major: 13 }  dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main(argv: list[str]) -> None:
    if len(argv) > 1 or (FLAGS.preset is None) == (FLAGS.config_json is None):
        raise app.UsageError("give one of --preset and --config_json, and no other arguments")
    with ends_in_one_line(remedy="lower --rows or --read_rows, or use more --chips", resumed="nothing is kept"):
        config = PRESETS[FLAGS.preset] if FLAGS.preset else families.from_hf_file(Path(FLAGS.config_json))
        mesh = make_mesh(FLAGS.model_parallel, devices())
        model = placed_model(config, mesh)
        with ops.compiling_for("gpu" if FLAGS.topology == "h100" else "tpu", int(FLAGS.memory_gb * 1e9)):
            for name, lower in {"sample": lower_sampling, "read": lower_reading}.items():
                print(json.dumps({"program": name} | measure(lower(model, mesh))), flush=True)


def devices() -> list[Any]:
    """Those that are compiled for."""
    gpu = FLAGS.topology == "h100"
    wanted = {"topology": f"1x1x{FLAGS.chips}", "target_config": H100} if gpu else {}
    try:
        name, platform = ("1x1x1", "cuda") if gpu else (FLAGS.topology, "tpu")
        found = topologies.get_topology_desc(name, platform, **wanted).devices
    except RuntimeError as error:  # no compiler, or it knows no such devices
        raise ValueError(f"--topology={FLAGS.topology}: {error}") from error
    if FLAGS.chips > len(found):
        raise ValueError(f"--chips={FLAGS.chips}, but --topology={FLAGS.topology} has {len(found)}")
    return found[: FLAGS.chips]


def placed_model(config: ModelConfig, mesh: Mesh) -> Decoder:
    """The model without its weights, each of them placed."""
    graphdef, state = nnx.split(quantized.abstract(config, jnp.dtype(FLAGS.dtype)))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    nnx.replace_by_pure_dict(state, jax.tree.map(place, nnx.to_pure_dict(state), shardings(config, mesh, FLAGS.dtype)))
    return nnx.merge(graphdef, state)


def lower_sampling(model: Decoder, mesh: Mesh) -> Any:
    """Steered sampling with temperature, as a batch of `generate_rows`."""
    n, shape = FLAGS.rows, (FLAGS.rows, FLAGS.prompt_tokens)
    L, D = model.config.n_layers, model.config.d_model
    rows = lambda: stack_rows([add_vector(jnp.full(D, D**-0.5), 0, 1.0, n_layers=L)] * n)  # noqa: E731
    keys = lambda: jax.random.split(jax.random.key(0), n)  # noqa: E731
    batch = (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32), jax.eval_shape(keys), jax.eval_shape(rows))
    sampling = generate.Sampling(jnp.float32(1), jnp.float32(1), jnp.int32(0), steps=("draw",))
    values = abstract((sampling, jnp.zeros(2, jnp.int32)), NamedSharding(mesh, PartitionSpec()))
    return generate.compiled_generate.lower(
        model, *abstract(batch, rows_sharding(mesh, n)), *values, max_new_tokens=FLAGS.new_tokens
    )


def lower_reading(model: Decoder, mesh: Mesh) -> Any:
    """Window sums of one batch of traces."""
    n, length = FLAGS.read_rows, FLAGS.read_tokens
    ids, reads, scale = (n, length), (n, GROUPS, WINDOWS, length), (n, GROUPS, WINDOWS)
    sections = (n, extract.section_slots(length // TOKENS_OF_SECTION), length)
    batch = [jnp.zeros(ids, jnp.int32), jnp.zeros(ids, jnp.int32), *map(jnp.zeros, (reads, scale, sections, ids))]
    layers = abstract(jnp.zeros(1, jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return extract.contraction(model).lower(model, *abstract(batch, rows_sharding(mesh, n)), layers)


def rows_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """As `place_rows`: a batch that the copies do not divide is left to each of them whole."""
    return NamedSharding(mesh, PartitionSpec()) if rows % mesh.shape[DATA] else batch_sharding(mesh)


def abstract(values: Any, sharding: NamedSharding) -> Any:
    """Shapes and dtypes, placed."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), values)


def measure(lowered: Any) -> dict[str, Any]:
    """Compiles, and looks at what came of it."""
    start = time.perf_counter()
    compiled = lowered.compile()
    memory, program = compiled.memory_analysis(), compiled.as_text()
    return {
        "given_gb": round(memory.argument_size_in_bytes / 1e9, 2),
        "on_the_way_gb": round(memory.temp_size_in_bytes / 1e9, 2),
        "compile_s": round(time.perf_counter() - start, 1),
        "copied_per_block_gb": round(copied_bytes(program) / 1e9, 3),
    } | loop_counts(program)


def copied_bytes(program: str) -> int:
    """Of slices that are written to main memory in the loop over blocks inside the loop over tokens."""
    slices = re.findall(r"dynamic[-_]slice\S* = bf16\[([\d,]+)\](\S*) (.*/while/body/while/body/.*)", program)
    # A part of a fused operation is written nowhere. Memory space 1 is a TPU core's own.
    written = [shape for shape, layout, rest in slices if rest.startswith("fusion(") and "S(1)" not in layout]
    return sum(2 * math.prod(map(int, shape.split(","))) for shape in written)


if __name__ == "__main__":
    app.run(main)
