"""Writes a Hugging Face checkpoint with random bfloat16 weights, to try sizes and speeds without a download.

    python scripts/make_random_checkpoint.py --preset=llama-3.1-8b --out=random-8b      16.06 GB in 4 files
    python scripts/make_random_checkpoint.py --config_json=FOLDER/config.json --out=random
    python scripts/make_random_checkpoint.py --load=random-8b                            peak memory and a forward pass

Weights are normal with standard deviation 0.02, norms 1 + 0.1 * normal. Each weight is one of 65,536 equally likely
quantiles of the normal distribution, looked up by 16 random bits, faster than drawing normal numbers. The same
seed gives the same files.

`--load` loads a checkpoint, runs a forward pass over 16 tokens, and prints one JSON line: seconds,
the process's peak resident memory as a multiple of the size of the weights, and whether the logits are finite.
"""

import functools
import json
import math
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import app, flags

from backtrack_jax.models import checkpoint, families
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.families.llama import LLAMA_3_1_8B
from backtrack_jax.models.safetensors import LazyTensor

PRESETS = {"llama-3.1-8b": LLAMA_3_1_8B}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

FLAGS = flags.FLAGS
flags.DEFINE_enum("preset", None, sorted(PRESETS), "Architecture by name.")
flags.DEFINE_string("config_json", None, "Architecture from this config.json.")
flags.DEFINE_string("out", None, "Folder to write; it must not exist.")
flags.DEFINE_integer("seed", 0, "Seed of the weights.")
flags.DEFINE_float("shard_gb", checkpoint.SHARD_BYTES / 1e9, "Largest file, in GB of 1e9 bytes.")
flags.DEFINE_string("load", None, "Instead of writing, load this checkpoint and measure.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if FLAGS.load:
        print(json.dumps(measure_load(FLAGS.load)))
        return
    if (FLAGS.preset is None) == (FLAGS.config_json is None) or not FLAGS.out:
        raise app.UsageError("give --out and one of --preset and --config_json, or --load")
    if FLAGS.seed < 0 or FLAGS.shard_gb <= 0:
        raise app.UsageError(f"--seed={FLAGS.seed} --shard_gb={FLAGS.shard_gb}, expected at least 0, and more than 0")
    config = PRESETS[FLAGS.preset] if FLAGS.preset else families.from_hf_file(Path(FLAGS.config_json))
    write(config, Path(FLAGS.out), FLAGS.seed, int(FLAGS.shard_gb * 1e9))


def write(config: ModelConfig, folder: Path, seed: int, shard_bytes: int) -> None:
    """Writes the folder, one tensor in memory at a time."""
    tensors = {}
    for number, (name, shape) in enumerate(checkpoint.expected_tensors(config).items()):
        read = functools.partial(random_tensor, shape, (seed, number))
        tensors[name] = LazyTensor(shape, BFLOAT16, read, "random numbers")
    checkpoint.write_hf(config, tensors, folder, shard_bytes)


def random_tensor(shape: tuple[int, ...], seed: tuple[int, int]) -> np.ndarray:
    """Weights of the given shape; a one-dimensional one is a norm's."""
    bits = np.random.Generator(np.random.SFC64(seed)).bytes(2 * math.prod(shape))
    mean, deviation = (1.0, 0.1) if len(shape) == 1 else (0.0, 0.02)
    return _quantiles(mean, deviation)[np.frombuffer(bits, np.uint16)].reshape(shape)


@functools.cache
def _quantiles(mean: float, deviation: float) -> np.ndarray:
    """[65536] bfloat16, the normal distribution's."""
    normal = statistics.NormalDist(mean, deviation)
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)]).astype(BFLOAT16)


def measure_load(path: str) -> dict[str, float | bool]:
    """Loads a checkpoint, runs 16 tokens through it, and says what that took."""
    jnp.zeros(()).block_until_ready()  # starts the backend
    before = _peak_bytes()
    start = time.perf_counter()
    model = checkpoint.load(path)
    loaded = time.perf_counter()
    after_load = _peak_bytes()
    positions = jnp.arange(16)[None]
    ids = (positions * 977) % model.config.vocab_size
    logits = jax.jit(lambda m, ids, positions: m.logits(m(ids, positions).resid))(model, ids, positions)
    finite = bool(jnp.isfinite(logits).all())
    size = model.config.n_parameters * model.dtype.itemsize
    return {
        "weights_gb": size / 1e9,
        "load_s": loaded - start,
        "forward_s": time.perf_counter() - loaded,
        "peak_gb_before_load": before / 1e9,
        "peak_gb_after_load": after_load / 1e9,
        "peak_gb": _peak_bytes() / 1e9,
        "peak_over_weights": _peak_bytes() / size,
        "logits_finite": finite,
    }


def _peak_bytes() -> int:
    """Peak resident memory so far, mapped files included; Linux only. (getrusage may count a parent process's.)"""
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) * 1024


if __name__ == "__main__":
    app.run(main)
