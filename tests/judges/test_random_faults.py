"""The judge against a server that draws its faults at random, killed and stopped at random: nothing lost or guessed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fault_server import FaultServer, honest_label
from test_judge_protocol import labelled, spec_of

from backtrack_jax.data.records import Trace, failure
from backtrack_jax.data.text import sentence_spans

FAULTS = ("429", "500", "503", "drop", "cut_body", "half_body", "web_page", "error_200")
ENDINGS = ("abort", "error", None, "something new")
SENTENCES = ("Okay, case {}.", "So it is {}.", "Wait, no {}.", "Then {}.")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def traces(n: int) -> list[Trace]:
    found = []
    for i in range(n):
        rng = random.Random(i)
        text = " ".join(rng.choice(SENTENCES).format(i) for _ in range(rng.randint(3, 9)))
        found.append(Trace(f"p{i}/0", f"p{i}", "c", f"What follows {i}?", text))
    return found


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = [{tests!r}]
from test_random_faults import labelled, spec_of, traces
from pathlib import Path
labelled(spec_of({url!r}, concurrency=8, max_retries=12), Path({ledger!r}), traces({n}))
"""


@pytest.mark.parametrize(
    ("n", "seed"), [(24, 0), *(pytest.param(200, seed, marks=pytest.mark.slow) for seed in range(1, 4))]
)
def test_nothing_is_lost_billed_twice_or_read_off_a_fault(n: int, seed: int, tmp_path: Path) -> None:
    rng, path, asked = random.Random(seed), tmp_path / "ledger.jsonl", traces(n)
    broken, in_flight = 0, 0

    def plan(content: str, attempt: int) -> str | None:
        drawn = random.Random(f"{seed} {content} {attempt}")
        return drawn.choice(FAULTS) if drawn.random() < 0.3 else None

    def change(number: int, body: dict[str, Any]) -> None:
        nonlocal broken
        drawn = random.Random(f"{seed} {number}")
        if drawn.random() < 0.1:
            broken += 1
            body["choices"][0]["finish_reason"] = drawn.choice(ENDINGS)

    with FaultServer(plan, latency=0.02) as server:
        server.change = change
        program = PROGRAM.format(tests=str(Path(__file__).parent), url=server.base_url, ledger=str(path), n=n)
        for number in [rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)) for _ in range(6 if n > 100 else 3)]:
            with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as process:
                seen, deadline = len(server.seen), time.monotonic() + 60
                wanted = seen + rng.randint(1, max(2, n // 4))
                while len(server.seen) < wanted and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.002)
                if process.poll() is None:
                    process.send_signal(number)
                    in_flight += 8 * (number == signal.SIGKILL)
                process.wait(60)
        found = labelled(spec_of(server.base_url, concurrency=8, max_retries=12), path, asked)
        assert n <= server.paid.total() <= n + broken + in_flight
    for trace in asked:
        one = found[trace.id]
        assert failure(one) is None, one
        expected = [(honest_label(trace.text[a:b]), a, b) for a, b in sentence_spans(trace)]
        assert [(s.label, s.start, s.stop) for s in one.sections] == expected
