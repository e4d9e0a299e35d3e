"""Measures how much faster the online judge is with many requests in flight than with one.

    python scripts/benchmark_judge.py

The endpoint is a server of its own process on loopback that answers after 100 ms. The last line printed is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from backtrack_jax.config import OpenAISpec
from backtrack_jax.data.records import Trace
from backtrack_jax.judges.openai.judge import label_traces

SERVER = Path(__file__).resolve().parents[1] / "tests" / "judges" / "fault_server.py"


def benchmark_judge(latency: float = 0.1, concurrency: int = 32, n_calls: int = 320) -> dict[str, float]:
    """Labels traces one request at a time, then with `concurrency` requests in flight.

    Args:
        latency: seconds that the server takes for every answer.
        concurrency: requests in flight in the second run.
        n_calls: requests of the second run; the first makes an eighth of them.

    Returns:
        `latency_s`, `concurrency`, seconds per call of either run (`one_s_per_call`, `many_s_per_call`), and their
        quotient `speedup`. Connecting is part of what is measured, starting Python is not.
    """
    traces = [Trace(f"{i}/0", str(i), "c", "Why?", f"Okay, {i}. So it is. Wait, no.") for i in range(n_calls)]
    os.environ["BENCHMARK_JUDGE_KEY"] = "none"
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, str(SERVER), f"--latency={latency}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        assert server.stdin is not None and server.stdout is not None
        spec = OpenAISpec(base_url=server.stdout.readline().strip(), key_variable="BENCHMARK_JUDGE_KEY")

        def seconds_per_call(run: list[Trace], spec: OpenAISpec, name: str) -> float:
            began = time.perf_counter()
            label_traces(run, spec, Path(folder) / name, on_done=lambda labelled, meter: None)
            return (time.perf_counter() - began) / len(run)

        seconds_per_call(traces[:concurrency], replace(spec, concurrency=concurrency), "warm-up")
        one = seconds_per_call(traces[: max(1, n_calls // 8)], replace(spec, concurrency=1), "one")
        many = seconds_per_call(traces, replace(spec, concurrency=concurrency), "many")
        server.stdin.close()
    return {
        "latency_s": latency,
        "concurrency": concurrency,
        "one_s_per_call": round(one, 5),
        "many_s_per_call": round(many, 5),
        "speedup": round(one / many, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.1, help="seconds the server takes for every answer")
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight")
    flags = parser.parse_args()
    print(json.dumps(benchmark_judge(flags.latency, flags.concurrency)))
