"""The programs that `benchmark.py` compares, each behind the same few methods, and the process that measures one.

    python scripts/benchmark_programs.py TASK PROGRAM FOLDER        started by benchmark.py

Reads FOLDER/work.json; writes TASK.PROGRAM.json and, as .npy, what is compared between programs. JAX, torch and this
package are imported where they are used: a process that measures the one must not hold the other.
"""

import dataclasses
import itertools
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

REPLY_START = 1  # of every sequence
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
RANKS = {"finetune": 0, "lora": 8}  # tasks that train: all weights, or adapters of this rank
LEARNING_RATE = 1e-4
LOGITS_LIMITS = {"float32": 1e-3, "bfloat16": 0.5}  # largest difference, in standard deviations of the logits


@dataclasses.dataclass(frozen=True)
class Work:
    """What every program is given, as JSON values.

    Attributes:
      model: name under which this package loads the model.
      hf_folder: the same weights in the layout of transformers.
      layer: block whose output is changed.
      vector: [D], of unit norm.
      prompts: [rows][T] ids.
      magnitudes: [rows].
      new_tokens: to be sampled for every row.
      sequences: [n][T] ids.
      starts: [n][sections] (label number, position).
      labels: of sections.
      offsets: windows of one position each, from a section's start.
      batch: sequences per batch.
      copies: of the model in this program, among which the rows of a batch are divided.
      nnsight_rows: rows and sequences that nnsight runs.
      repeats: timed runs.
      products: (rows, in, out) of the matrix products to time.
    """

    model: str
    hf_folder: str
    layer: int
    vector: list[float]
    prompts: list[list[int]]
    magnitudes: list[float]
    new_tokens: int
    sequences: list[list[int]]
    starts: list[list[tuple[int, int]]]
    labels: list[str]
    offsets: list[int]
    batch: int
    copies: int
    nnsight_rows: int
    repeats: int
    products: list[tuple[int, int, int]]


class Program(Protocol):
    """A program under test. `rows` and `sequences` are those of the work that it runs."""

    work: Work
    dtype: str
    rows: list[int]
    sequences: list[int]
    warm_up_tokens: int  # sampled before the timed runs

    def logits(self) -> np.ndarray:
        """[all rows, V] float32, after the prompts, unsteered."""
        ...

    def steer(self, new_tokens: int) -> np.ndarray:
        """[rows, new_tokens] ids."""
        ...

    def extract(self) -> None:
        """Reads the activations of `sequences`."""
        ...

    def sums(self) -> np.ndarray:
        """[2, L, labels, offsets, D] of the first batch: sums over traces of a trace's mean, and over positions."""
        ...

    def device(self) -> dict[str, Any]:
        """Device, threads and, on an accelerator, peak memory."""
        ...


class Ours:
    """This package."""

    def __init__(self, work: Work, dtype: str):
        import jax
        import jax.numpy as jnp

        from backtrack_jax import extract, generate
        from backtrack_jax.intervention import add_vector
        from backtrack_jax.models import checkpoint
        from backtrack_jax.models.sharding import make_mesh

        self.work, self.dtype, self.warm_up_tokens = work, dtype, work.new_tokens  # as many, since that is compiled for
        self.rows, self.sequences = list(range(len(work.prompts))), list(range(len(work.sequences)))
        mesh = None
        if work.copies > 1:
            jax.config.update("jax_num_cpu_devices", work.copies)  # of a CPU; accelerators are as many as there are
            mesh = make_mesh(1, jax.devices()[: work.copies])
        self._model = checkpoint.load(work.model, dtype, mesh=mesh)
        n_layers, vector = self._model.config.n_layers, jnp.array(work.vector)
        self._rows = [
            generate.Row(prompt, jax.random.key(row), add_vector(vector, work.layer, magnitude, n_layers=n_layers))
            for row, (prompt, magnitude) in enumerate(zip(work.prompts, work.magnitudes, strict=True))
        ]
        self._traces = [
            extract.TokenTrace(str(n), ids, REPLY_START, [(work.labels[label], at) for label, at in starts])
            for n, (ids, starts) in enumerate(zip(work.sequences, work.starts, strict=True))
        ]
        labels, windows = tuple(work.labels), tuple((offset, offset) for offset in work.offsets)
        self._plan = extract.WindowPlan(labels, {label: (label,) for label in labels}, windows, (work.layer,))

    def logits(self) -> np.ndarray:
        import jax
        import jax.numpy as jnp

        ids = jnp.array(self.work.prompts)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return np.asarray(jax.jit(lambda m, i, p: m.logits(m(i, p).resid[:, -1]))(self._model, ids, positions))

    def steer(self, new_tokens: int) -> np.ndarray:
        from backtrack_jax.generate import Sampling, generate_rows

        (batch,) = generate_rows(
            self._model,
            self._rows,
            sampling=Sampling(temperature=0.0),
            stop_ids=(),
            max_new_tokens=new_tokens,
            batch_size=len(self._rows),
        )
        return np.array([reply.ids for _, reply in batch])

    def extract(self) -> None:
        self._window_sums(len(self._traces))

    def sums(self) -> np.ndarray:
        return self._window_sums(self.work.batch)

    def _window_sums(self, n: int) -> np.ndarray:
        from backtrack_jax.extract import window_sums

        return window_sums(self._model, self._traces[:n], self._plan, batch_size=self.work.batch).sums

    def device(self) -> dict[str, Any]:
        import jax

        from backtrack_jax.files import environment

        device = jax.local_devices()[0]
        revision = environment.describe()["git_revision"]
        found = {"device": device.device_kind, "threads": cores(), "git_revision": revision}
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")  # None on CPU
        return found if peak is None else found | {"device_peak_gb": peak / 1e9}


class HuggingFace:
    """transformers in its fastest plain form: batched, default attention, no padding, no logits that nobody reads."""

    warm_up_tokens = 2

    def __init__(self, work: Work, dtype: str):
        import torch
        import transformers

        self.work, self.dtype = work, dtype
        self.rows, self.sequences = list(range(len(work.prompts))), list(range(len(work.sequences)))
        self._on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(work.hf_folder, dtype=getattr(torch, dtype))
        self._model = model.to(self._on).eval()
        # Without a stop token, so that every program samples as many tokens.
        self._model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        vectors = torch.tensor(work.magnitudes)[:, None] * torch.tensor(work.vector)
        self._added = vectors[:, None].to(self._on, self._model.dtype)  # [rows, 1, D]
        self._prompts = torch.tensor(work.prompts, device=self._on)

    def logits(self) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self._model(self._prompts, logits_to_keep=1).logits[:, -1].float().cpu().numpy()

    def steer(self, new_tokens: int) -> np.ndarray:
        import torch

        block = self._model.model.layers[self.work.layer]
        hook = block.register_forward_hook(lambda module, inputs, output: output + self._added)
        mask = torch.ones_like(self._prompts)
        with torch.inference_mode():
            ids = self._model.generate(self._prompts, attention_mask=mask, max_new_tokens=new_tokens)
        hook.remove()
        return ids[:, self._prompts.shape[1] :].cpu().numpy()

    def extract(self) -> None:
        import torch

        for first in range(0, len(self.sequences), self.work.batch):
            self._hidden_states(self.work.sequences[first : first + self.work.batch])
            if self._on.type == "cuda":
                torch.cuda.synchronize()

    def sums(self) -> np.ndarray:
        import torch

        last: list[Any] = []  # in place of the last of the hidden states, which is the final norm's output
        hook = self._model.model.norm.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0]))
        states = self._hidden_states(self.work.sequences[: self.work.batch])
        hook.remove()
        return sums_of_hidden(torch.stack([*states[1:-1], *last]).float().cpu().numpy(), self.work)

    def _hidden_states(self, sequences: list[list[int]]) -> Any:
        import torch

        with torch.inference_mode():
            ids = torch.tensor(sequences, device=self._on)
            return self._model.model(ids, output_hidden_states=True, use_cache=False).hidden_states

    def device(self) -> dict[str, Any]:
        import torch

        if self._on.type == "cpu":
            return {"device": "cpu", "threads": torch.get_num_threads()}
        peak = torch.cuda.max_memory_allocated() / 1e9
        return {"device": torch.cuda.get_device_name(), "threads": torch.get_num_threads(), "device_peak_gb": peak}


class NNsight(HuggingFace):
    """nnsight around the same model, one row at a time, as in the paper's code."""

    def __init__(self, work: Work, dtype: str):
        import nnsight
        import tokenizers
        import transformers

        super().__init__(work, dtype)
        self.rows, self.sequences = (
            sorted({int(i) for i in np.linspace(0, len(rows) - 1, work.nnsight_rows).round()})
            for rows in (work.prompts, work.sequences)
        )
        # It asks for a tokenizer even where it is given ids.
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"-": 0}, unk_token="-"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="-")
        self._traced: Any = nnsight.TransformersModel(self._model, tokenizer=tokenizer, task="text-generation")

    def steer(self, new_tokens: int) -> np.ndarray:
        replies = []
        for row in self.rows:
            inputs, added = self._inputs(self.work.prompts[row]), self._added[row]
            with self._traced.generate(inputs, max_new_tokens=new_tokens, do_sample=False) as tracer:
                for _ in tracer.iter[:new_tokens]:
                    block = self._traced.model.layers[self.work.layer]
                    block.output = block.output + added
                ids = tracer.result.save()
            replies.append(ids[0, self._prompts.shape[1] :].cpu().numpy())
        return np.stack(replies)

    def extract(self) -> None:
        for n in self.sequences:
            self._block_outputs(self.work.sequences[n])

    def sums(self) -> np.ndarray:
        rows = [self._block_outputs(ids) for ids in self.work.sequences[: self.work.batch]]
        hidden = np.stack([[layer[0].float().cpu().numpy() for layer in row] for row in rows], axis=1)
        return sums_of_hidden(hidden, self.work)

    def _block_outputs(self, ids: list[int]) -> list[Any]:
        import nnsight
        import torch

        with torch.no_grad(), self._traced.trace(self._inputs(ids)):
            kept = nnsight.save([])
            for block in self._traced.model.layers:
                kept.append(block.output)
        return kept

    def _inputs(self, ids: list[int]) -> dict[str, Any]:
        import torch

        row = torch.tensor([ids], device=self._on)
        return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def ours_training(work: Work, dtype: str, rank: int) -> tuple[Callable[[], float], str]:
    """A step of this package's training on the first batch, which returns the loss before it, and the device.

    Rank 0 trains all weights.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from backtrack_jax.models import checkpoint
    from backtrack_jax.training import fit as train
    from backtrack_jax.training import lora
    from backtrack_jax.training.packing import Tokens, pack

    model = checkpoint.load(work.model, dtype if rank else "float32")  # as scripts/finetune.py does
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    frozen: Any = ()
    if rank:
        params, frozen, build = lora.trainable(model, lora.Lora(rank), jax.random.key(0))
    else:
        params, build = train.trainable(model)
    state = train.new_state(params, optimizer, frozen)
    step = train.make_step(build, optimizer, jnp.dtype(dtype))
    sequences = work.sequences[: work.batch]
    rows = pack([Tokens(ids) for ids in sequences], len(sequences[0]))

    def run() -> float:
        nonlocal state
        state, loss = step(state, rows)
        return float(loss)

    return run, jax.local_devices()[0].device_kind


def hf_training(work: Work, dtype: str, rank: int) -> tuple[Callable[[], float], str]:
    """The same with transformers' model, torch's AdamW and PEFT's adapters; 16 bits by autocast, weights in float32."""
    import torch
    import transformers

    on = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(work.hf_folder, dtype=torch.float32)
    model: Any = loaded.to(on)
    if rank:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0)
    ids = torch.tensor(work.sequences[: work.batch], device=on)

    def run() -> float:
        with torch.autocast(on, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return run, on


def make(name: str, work: Work) -> Program:
    """The program called, for instance, `hf_bf16`."""
    if name == "nnsight":
        return NNsight(work, "float32")
    kind, dtype = name.split("_")
    return {"ours": Ours, "hf": HuggingFace}[kind](work, DTYPES[dtype])


def sums_of_hidden(hidden: np.ndarray, work: Work) -> np.ndarray:
    """What `extract.window_sums` gives, out of hidden states [L, B, T, D], by plain indexing."""
    n_layers, n_rows, length, width = hidden.shape
    sums = np.zeros((2, n_layers, len(work.labels), len(work.offsets), width))
    for row, label, (o, offset) in itertools.product(range(n_rows), range(len(work.labels)), enumerate(work.offsets)):
        at = [start + offset for of, start in work.starts[row] if of == label]
        at = [position for position in at if REPLY_START <= position < length]
        if at:
            read = hidden[:, row, at].astype(np.float64)
            sums[:, :, label, o] += np.stack([read.mean(axis=1), read.sum(axis=1)])
    return sums


def jax_product(m: int, k: int, n: int, dtype: str) -> Callable[[int], object]:
    """A function that multiplies [m, k] x [k, n] so many times, as this package's model does."""
    import jax

    from backtrack_jax.models.ops import matmul

    x, w = (jax.random.normal(jax.random.key(0), shape).astype(dtype) for shape in ((m, k), (k, n)))
    return _again_and_again(matmul, x, w)


def _again_and_again(function: Callable[..., object], *given: object) -> Callable[[int], object]:
    """Runs it so often, each into the memory of the last result: to get new memory may take as long as a product."""
    import jax

    again = jax.jit(lambda last, *given: function(*given), donate_argnums=0, keep_unused=True)
    last = jax.jit(function)(*given)

    def run(times: int) -> None:
        nonlocal last
        for _ in range(times):
            last = again(last, *given)
        jax.block_until_ready(last)

    return run


def torch_product(m: int, k: int, n: int, dtype: str) -> Callable[[int], object]:
    """A function that multiplies [m, k] x [k, n] so many times, as the models of transformers do."""
    import torch

    on = "cuda" if torch.cuda.is_available() else "cpu"
    x, w = (torch.randn(shape, device=on).to(getattr(torch, dtype)) for shape in ((m, k), (n, k)))

    def run(times: int) -> None:
        for _ in range(times):
            torch.nn.functional.linear(x, w)
        if on == "cuda":
            torch.cuda.synchronize()

    return run


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


PRODUCTS = {"torch": torch_product, "jax": jax_product}


def shape_name(shape: Sequence[int]) -> str:
    """Such as 64x576x1536."""
    return "x".join(map(str, shape))


def measure(task: str, name: str, folder: Path) -> None:
    """What a measuring process does: one program, one task."""
    work = Work(**json.loads((folder / "work.json").read_text()))
    start = time.perf_counter()
    try:
        if task == "matmul":
            result = measure_products(PRODUCTS[name], work)
        elif task in RANKS:
            result = measure_training(task, name, work, folder) | {"peak_gb": peak_gb()}
        else:
            program = make(name, work)
            loaded = {"dtype": program.dtype, "load_s": time.perf_counter() - start}
            measured = {"sweep": measure_sweep, "extract": measure_extract}[task](program, folder, name)
            result = loaded | measured | program.device() | {"peak_gb": peak_gb()}
    except ModuleNotFoundError as error:
        result = {"absent": str(error)}
    (folder / f"{task}.{name}.json").write_text(json.dumps(result))


def measure_products(multiplier: Callable[..., Callable[[int], object]], work: Work) -> dict[str, dict[str, float]]:
    """GFLOP/s by dtype and shape, of the fastest of five runs of about a tenth of a second."""
    found: dict[str, dict[str, float]] = {dtype: {} for dtype in DTYPES.values()}
    for dtype, shape in itertools.product(found, dict.fromkeys(map(tuple, work.products))):
        multiply = multiplier(*shape, dtype)
        multiply(1)
        times = int(np.clip(0.1 / timed(lambda m=multiply: m(1))["s"], 1, 100))
        best = min(timed(lambda m=multiply, t=times: m(t))["s"] for _ in range(5))
        found[dtype][shape_name(shape)] = 2 * times * np.prod(shape) / best / 1e9
    return found


def measure_training(task: str, name: str, work: Work, folder: Path) -> dict[str, Any]:
    """Times steps on the first batch; the losses of the first steps are what is compared."""
    if name == "nnsight":
        raise ModuleNotFoundError("nnsight does not train")
    kind, dtype = name.split("_")
    start = time.perf_counter()
    step, device = {"ours": ours_training, "hf": hf_training}[kind](work, DTYPES[dtype], RANKS[task])
    loaded = {"dtype": DTYPES[dtype], "load_s": time.perf_counter() - start, "device": device, "threads": cores()}
    losses: list[float] = []
    warm_up = timed(lambda: losses.append(step()))
    runs = [timed(lambda: losses.append(step())) for _ in range(max(2, work.repeats))]
    np.save(folder / f"{task}.{name}.npy", losses[:3])
    tokens = work.batch * len(work.sequences[0])
    return loaded | {"rows": list(range(work.batch)), "losses": losses} | summary(warm_up, runs, tokens)


def measure_sweep(program: Program, folder: Path, name: str) -> dict[str, Any]:
    """Checks the logits, warms up, and times sampling."""
    difference = logits_difference(program, folder)
    warm_up = timed(lambda: program.steer(program.warm_up_tokens))
    replies: list[np.ndarray] = []
    runs = [timed(lambda: replies.append(program.steer(program.work.new_tokens))) for _ in range(program.work.repeats)]
    expected = (len(program.rows), program.work.new_tokens)
    if replies[-1].shape != expected:
        raise ValueError(f"{name} sampled tokens of shape {replies[-1].shape}, expected {expected}")
    np.save(folder / f"sweep.{name}.npy", replies[-1])
    return {"rows": program.rows, "logits_difference": difference} | summary(warm_up, runs, replies[-1].size)


def measure_extract(program: Program, folder: Path, name: str) -> dict[str, Any]:
    """Sums the windows of the first batch, which is compared and also warms up, and times the reading of all."""
    warm_up = timed(lambda: np.save(folder / f"extract.{name}.npy", program.sums()))
    runs = [timed(program.extract) for _ in range(program.work.repeats)]
    tokens = len(program.sequences) * len(program.work.sequences[0])
    return {"rows": program.sequences} | summary(warm_up, runs, tokens)


def logits_difference(program: Program, folder: Path) -> float | None:
    """Largest difference from the first float32 program's logits, in their standard deviations."""
    logits, reference = program.logits(), folder / "logits.npy"
    if not reference.exists():
        if program.dtype == "float32":
            np.save(reference, logits)
        return None
    expected = np.load(reference)
    difference, limit = float(np.abs(logits - expected).max() / expected.std()), LOGITS_LIMITS[program.dtype]
    if not difference <= limit:
        raise ValueError(f"logits differ from the reference by {difference:.3g} of their deviation, limit {limit}")
    return difference


def timed(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of wall time, and of processor time of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def summary(warm_up: Mapping[str, float], runs: Sequence[Mapping[str, float]], tokens: int) -> dict[str, Any]:
    """Speed of the fastest run; `busy_cores` near the number of cores says that the machine was free."""
    best = min(runs, key=lambda run: run["s"])
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / best["s"],
        "runs_s": [run["s"] for run in runs],
        "warm_up_s": warm_up["s"],
        "busy_cores": best["cpu_s"] / best["s"],
    }


def peak_gb() -> float:
    """Peak resident memory of this process; in Linux's `getrusage` that of the process that started it is included."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts in bytes
    (kib,) = re.findall(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kib) * 1024 / 1e9


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
