"""The script that has more problems written, as a process, against the fault server."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_server import FaultServer

from backtrack_jax.data.problems import shipped_problems
from backtrack_jax.data.records import Problem, read_problems
from backtrack_jax.judges.openai.ledger import read_entries

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-test-0123456789"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "problems.jsonl"


def command(server: FaultServer, out: Path, *arguments: str) -> list[str]:
    quick = {"base_url": server.base_url, "model": "writer-1", "backoff": 0.001, "max_backoff": 0.01, "concurrency": 2}
    flags = [f"--{name}={value}" for name, value in quick.items()]
    return [sys.executable, str(ROOT / "scripts" / "write_problems.py"), f"--out={out}", *flags, *arguments]


def environment(**changes: str) -> dict[str, str]:
    proxies = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    return (
        {name: value for name, value in os.environ.items() if name not in proxies} | {"OPENAI_API_KEY": KEY} | changes
    )


def run(server: FaultServer, out: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(server, out, *arguments), env=environment(**changes), capture_output=True, text=True)
    assert "Traceback" not in done.stderr and KEY not in done.stderr + done.stdout
    return done


def eight_words(problem: Problem) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", problem.problem.lower())
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


def test_problems_are_written_once_and_more_of_them_cost_only_the_rest(server: FaultServer, out: Path) -> None:
    arguments = ("--categories=spatial,causal", "--per_category=25")
    done = run(server, out, *arguments)
    assert done.returncode == 0, done.stderr
    problems = read_problems(out)
    assert [p.id for p in problems] == [f"{name}_{n}" for name in ("spatial", "causal") for n in range(30, 55)]
    assert {p.id for p in problems}.isdisjoint(p.id for p in shipped_problems())
    runs = [eight_words(p) for p in problems]
    assert len(set().union(*runs)) == sum(map(len, runs))  # no two share a run of eight words
    # Three sets of ten each; the first problem of every set is the same one.
    assert "50 problems are in" in done.stderr and "not taken: 4 variant" in done.stderr
    assert len(server.seen) == 6 and set(server.paid.values()) == {1}
    body = server.seen[0].body
    assert (body["model"], body["temperature"]) == ("writer-1", 1.0)
    assert {seen.body["seed"] for seen in server.seen} == {0, 1, 2}
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["problems"]

    before = out.read_bytes()
    again = run(server, out, *arguments)
    assert "0 paid, 6 from the ledger" in again.stderr and out.read_bytes() == before
    more = run(server, out, "--categories=spatial,causal", "--per_category=35")
    assert more.returncode == 0 and len(server.seen) == 8
    assert read_problems(out)[:25] == problems[:25]


def test_a_run_that_fails_leaves_a_longer_file_alone(server: FaultServer, out: Path) -> None:
    assert run(server, out, "--categories=spatial,spatial", "--per_category=12").returncode == 0
    before = out.read_bytes()
    assert before.count(b"\n") == 12
    server.plan = lambda content, attempt: "too_long"
    failed = run(server, out, "--categories=spatial", "--per_category=12", "--temperature=0.5")
    assert failed.returncode == 1 and "12 of spatial are missing" in failed.stderr
    assert "problems.jsonl is left as it was, with 12" in failed.stderr and out.read_bytes() == before
    new = out.with_name("new.jsonl")
    assert run(server, new, "--categories=spatial", "--per_category=12").returncode == 1
    assert not new.exists()


def test_categories_are_named_and_count_once(server: FaultServer, out: Path) -> None:
    none = run(server, out, "--categories=")
    assert none.returncode != 0 and "--categories: none is named; accepted: math_logic, " in none.stdout + none.stderr
    assert not out.exists() and server.seen == []
    twice = run(server, out, "--categories=spatial,spatial", "--per_category=10", "--dry_run")
    assert twice.stdout.startswith("1 calls to pay")


def test_faults_are_retried_or_counted_and_nothing_is_paid_twice(server: FaultServer, out: Path) -> None:
    passing = iter(["429", "500", "drop", "cut_body", "half_body"])
    useless = iter(["empty", "chat", "truncated_json", "refusal", "length", "echo", "null"])

    def plan(content: str, attempt: int) -> str | None:
        number = int(content.split("This is set ")[1].split(";")[0])
        return (next(passing, None) if attempt == 0 else None) if number > 1 else next(useless, None)

    server.plan, server.retry_after = plan, "0.01"
    names = "math_logic,spatial,verbal,pattern,lateral,causal,probability"
    done = run(server, out, f"--categories={names}", "--per_category=15")
    assert done.returncode == 0, done.stderr
    assert len(read_problems(out)) == 7 * 15
    for reason, count in (("refused answer", 1), ("truncated answer", 1), ("unusable answer", 5), ("variant", 7)):
        assert f"{count} {reason}" in done.stderr
    assert set(server.paid.values()) == {1}


def test_calls_without_an_answer_are_named_and_asked_again(server: FaultServer, out: Path) -> None:
    server.plan = lambda content, attempt: "500"
    done = run(server, out, "--categories=verbal", "--per_category=5", "--max_retries=0")
    assert done.returncode == 1 and "5 of verbal are missing" in done.stderr
    assert "4 server_error" in done.stderr and read_entries(out.with_suffix(".ledger.jsonl")) == {}
    server.plan = lambda content, attempt: None
    assert run(server, out, "--categories=verbal", "--per_category=5").returncode == 0
    assert server.paid.total() == 1 and len(read_problems(out)) == 5


def test_sigkill_pays_again_for_nothing_but_calls_in_flight(server: FaultServer, out: Path) -> None:
    server.latency = 0.1
    reached = threading.Event()
    server.on_paid = lambda count: reached.set() if count >= 3 else None
    arguments = ("--categories=spatial", "--per_category=70")
    process = subprocess.Popen(command(server, out, *arguments), env=environment(), stderr=subprocess.DEVNULL)
    assert reached.wait(60)
    process.kill()
    process.wait()
    recorded = len(read_entries(out.with_suffix(".ledger.jsonl")))
    assert recorded >= 1 and not out.exists()
    done = run(server, out, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"{recorded} from the ledger" in done.stderr and len(read_problems(out)) == 70
    assert server.paid.total() <= 8 + 2  # seven sets, one more for what was not taken, and two in flight


@pytest.mark.parametrize(
    ("fault", "message"),
    [("wrong_key", "refuses the key"), ("unknown_model", "has no model 'writer-1'"), ("quota", "out of money")],
)
def test_a_stop_keeps_what_was_paid(server: FaultServer, out: Path, fault: str, message: str) -> None:
    server.plan = lambda content, attempt: fault if server.paid.total() >= 2 else None
    stopped = run(server, out, "--categories=spatial", "--per_category=50", "--concurrency=1")
    assert stopped.returncode == 1 and message in stopped.stderr and stopped.stderr.count("error: ") == 1
    assert not out.exists() and len(read_entries(out.with_suffix(".ledger.jsonl"))) == 2
    server.plan = lambda content, attempt: None
    assert run(server, out, "--categories=spatial", "--per_category=50").returncode == 0
    assert set(server.paid.values()) == {1} and KEY not in out.with_suffix(".ledger.jsonl").read_text()


def test_the_estimate_needs_no_key_and_a_mistake_is_named(server: FaultServer, out: Path) -> None:
    prices = ("--input_price=2.5", "--output_price=10")
    plan = run(server, out, "--dry_run", *prices, OPENAI_API_KEY="")
    # 10 categories x 3 sets x 10 problems x 70 tokens
    assert plan.returncode == 0 and "30 calls to pay, 0 in the ledger" in plan.stdout
    assert "21,000 of answers; about $0.2" in plan.stdout
    for arguments, message in (
        (["--categories=spatial,maths"], r"--categories: \['maths'\] unknown; accepted: math_logic, spatial"),
        (["--out=problems.json"], r"--out=problems\.json: the file is JSONL"),
        (["--modle=x"], r"Unknown command line flag 'modle'"),
        (["--base_url=host"], "base_url 'host' is not an address"),
    ):
        done = run(server, out, *arguments)
        assert done.returncode == 1 and re.search(message, done.stderr + done.stdout)
    without = run(server, out, OPENAI_API_KEY="")
    assert without.returncode == 1 and "OPENAI_API_KEY is not set" in without.stderr
    assert server.seen == [] and not out.exists()
