"""Stage 2 with the online judge, as a user runs it: kept, resumed, estimated, and stopped with a message."""

import dataclasses
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from fault_server import FaultServer

from backtrack_jax import checks, pipeline, plan
from backtrack_jax.analysis import agreement
from backtrack_jax.config import Experiment, OpenAISpec
from backtrack_jax.data import records
from backtrack_jax.data.annotations import Reason
from backtrack_jax.data.records import FAILED
from backtrack_jax.data.text import reasoning_end, split_sentences
from backtrack_jax.files import store, tables
from backtrack_jax.judges import imported, keyword
from backtrack_jax.judges.base import trace_judge
from backtrack_jax.judges.openai.judge import label_traces
from backtrack_jax.judges.openai.ledger import read_entries
from backtrack_jax.judges.openai.prompts import JudgePrompt
from backtrack_jax.judges.openai.settings import JudgeStopped, request
from backtrack_jax.stages.analysis import ANALYSIS
from backtrack_jax.stages.annotations import ANNOTATIONS
from backtrack_jax.stages.steering import STEERING

TINY = Path(tiny.__file__)
KEY = "sk-test-0123456789"
RESULTS = Path("results/tiny")
LEDGER = Path("results/judge-ledger.jsonl")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    tiny.write(folder)
    return folder


@pytest.fixture(autouse=True)
def place(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, with models and chains and no results; the key; no proxy."""
    shutil.copytree(written, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


def experiment(base_url: str, **changes: Any) -> Experiment:
    e = tiny.get_config()
    e.annotations.judge = "openai"
    quick = {"model": "judge-1", "backoff": 0.001, "max_backoff": 0.01, "max_retries": 3}
    e.annotations.openai = OpenAISpec(base_url=base_url, **(quick | changes))
    return e


def run(e: Experiment) -> None:
    checks.check(e)
    pipeline.Run(e, ("1-traces", "2-annotations")).run()


def made(server: FaultServer, **changes: Any) -> pipeline.Run:
    return pipeline.Run(experiment(server.base_url, **changes), ("1-traces", "2-annotations"))


def labelled(made: pipeline.Run) -> bool:
    return made.done(ANNOTATIONS)


def annotations() -> list[records.Annotation]:
    return records.read_annotations(RESULTS / "2-annotations" / "annotations.jsonl")


def reasons() -> dict[str, str]:
    found = {a.trace_id: a.rejected[0].reason for a in annotations() if a.rejected and not a.sections}
    return {trace: reason.removeprefix(FAILED) for trace, reason in found.items()}


@pytest.mark.parametrize("format_", ["sentences", "inline"])
def test_every_trace_is_labelled_and_the_judge_is_named(server: FaultServer, format_: str) -> None:
    run(experiment(server.base_url, format=format_))
    traces = records.read_traces(RESULTS / "1-traces" / "traces.jsonl")
    assert [a.trace_id for a in annotations()] == [trace.id for trace in traces]
    assert {a.judge for a in annotations()} == {f"openai:judge-1:{format_}:{JudgePrompt(format_).hash}"}
    for trace, annotation in records.pair_annotations(traces, annotations()):
        starts = {trace.text[s.start : s.stop].split()[0]: s.label for s in annotation.sections}
        assert starts.get("Wait,", "backtracking") == "backtracking" and starts.get("First", "deduction") == "deduction"
    assert sum(s.label == "backtracking" for a in annotations() for s in a.sections) >= 10
    assert set(server.paid.values()) == {1} and server.paid.total() == 12 == len(read_entries(LEDGER))


def test_nothing_is_paid_twice_whatever_becomes_of_the_results(server: FaultServer) -> None:
    """The ledger outlives a change of the config, a change back, another experiment and deleted results."""
    run(experiment(server.base_url))
    first = (RESULTS / "2-annotations" / "annotations.jsonl").read_bytes()
    keyword = experiment(server.base_url)
    keyword.annotations.judge, keyword.steering.kinds = "keyword", ("backtracking",)
    run(keyword)
    run(experiment(server.base_url))
    shutil.rmtree(RESULTS)
    run(experiment(server.base_url, concurrency=1))
    assert (RESULTS / "2-annotations" / "annotations.jsonl").read_bytes() == first
    other = experiment(server.base_url)
    other.name, other.traces.limit = "other", 5
    run(other)
    assert len(server.seen) == 12
    run(experiment(server.base_url, votes=3))  # one answer of the three is there
    assert len(server.seen) == 36
    named = experiment(server.base_url, ledger="mine/answers.jsonl")
    named.name, named.workdir = "third", "elsewhere"  # beside the others it would take over their labels
    run(named)
    assert len(server.seen) == 48 and len(read_entries("mine/answers.jsonl")) == 12


def test_the_table_by_strength_of_steered_replies(server: FaultServer, tiny_run: Path) -> None:
    """Table C.1: the keyword judge against an LLM on the replies of a sweep. This server's LLM knows only `Wait`."""
    traces, strengths = agreement.reply_traces(STEERING.read(STEERING.path(tiny_run / RESULTS)))
    records.write_jsonl("replies.jsonl", traces)
    assert records.read_traces("replies.jsonl") == traces and len(traces) > 50
    by_llm: list[records.Annotation] = []
    spec = experiment(server.base_url).annotations.openai
    label_traces(traces, spec, LEDGER, on_done=lambda done, _: by_llm.append(done.annotation))
    by_keyword = [keyword.annotate(trace) for trace in traces]
    rows = agreement.agreement(traces, by_llm, by_keyword, unit="sentence", groups=strengths)
    assert [row.group for row in rows] == ["all", *dict.fromkeys(strengths.values())] and "0" in strengths.values()
    assert sum(row.n_units for row in rows[1:]) == rows[0].n_units >= len(by_llm) // 2
    hits = [s for a in by_keyword for s in a.sections if s.label == "backtracking"]
    assert rows[0].n_other == len(hits) > 0


def test_only_what_is_asked_makes_the_stage_run_again(server: FaultServer) -> None:
    run(experiment(server.base_url))
    same: dict[str, Any] = {
        "base_url": "http://elsewhere/v1",
        "key_variable": "OTHER",
        "concurrency": 3,
        "backoff": 2.0,
    }
    same |= {"request_timeout": 1.0, "call_timeout": 2.0, "run_timeout": 3.0, "max_retries": 0, "max_backoff": 9.0}
    same |= {
        "input_price": 1.0,
        "cached_price": 0.5,
        "output_price": 2.0,
        "max_cost": 1.0,
        "ledger": "x",
        "allow_unanswered": True,
    }
    other: dict[str, Any] = {"model": "m", "format": "inline", "backtracking": "change", "response_format": "none"}
    other |= {"votes": 2, "reask": 1, "temperature": -1.0, "seed": 4, "max_tokens": 9, "extra_body": '{"top_p": 1}'}
    assert same.keys() | other.keys() == {field.name for field in dataclasses.fields(OpenAISpec)}
    for changes, done in ((same, True), (other, False)):
        for name, value in changes.items():
            e = experiment(server.base_url)
            setattr(e.annotations.openai, name, value)
            assert labelled(pipeline.Run(e, ("1-traces", "2-annotations"))) is done, name


def test_answers_of_no_use_are_counted_by_reason_and_the_stage_is_done(server: FaultServer) -> None:
    faults = iter(["empty", "refusal", "chat", "length", "bad_labels", "too_long"] + [None] * 6)
    server.plan = lambda content, attempt: next(faults)
    run(experiment(server.base_url, concurrency=1))
    expected = ["empty_reply", "refused", "unlabelled_reply", "truncated_reply", "mislabelled_reply", "bad_request"]
    assert sorted(reasons().values()) == sorted(expected)
    summary = (RESULTS / "2-annotations" / "summary.txt").read_text()
    assert all(re.search(rf"^  judge_failed:{reason} +1 ", summary, re.MULTILINE) for reason in expected)
    run(experiment(server.base_url))
    assert len(server.seen) == 12


def test_calls_without_an_answer_leave_the_stage_open_and_are_asked_alone(server: FaultServer) -> None:
    hard = {"math_logic_1/0", "spatial_3/0"}
    problems = {f"Add {number} and two, with no words." for number in (5, 11)}
    server.plan = lambda content, attempt: "500" if any(problem in content for problem in problems) else None
    with pytest.raises(
        JudgeStopped, match=r"2 of 12 traces got no answer from the judge \(2 server_error\)\. The others"
    ):
        run(experiment(server.base_url))
    assert server.paid.total() == 10 and not (RESULTS / "2-annotations" / "DONE").exists()
    run(experiment(server.base_url, allow_unanswered=True))
    assert reasons() == dict.fromkeys(hard, "server_error")
    assert labelled(made(server, allow_unanswered=True))
    gaps, whole = made(server, allow_unanswered=True), made(server)
    assert not labelled(whole)
    assert gaps.inputs["3-vectors"] != whole.inputs["3-vectors"]  # vectors of traces with gaps are not kept either
    before = len(server.seen)
    server.plan = lambda content, attempt: None
    run(experiment(server.base_url))
    assert len(server.seen) == before + 2 and set(server.paid.values()) == {1} and reasons() == {}
    assert labelled(made(server, allow_unanswered=True))
    assert made(server, allow_unanswered=True).inputs == made(server).inputs == whole.inputs


def test_gaps_in_the_labels_of_replies_are_asked_for_once_they_are_not_allowed(server: FaultServer) -> None:
    def of_replies(**spec: Any) -> Experiment:
        e = experiment(server.base_url, **spec)
        e.annotations.judge, e.analysis.judge = "released", "openai"
        e.steering.kinds, e.steering.limit, e.steering.samples = ("backtracking",), 1, 1
        e.steering.baselines = e.steering.offsets = e.steering.layers = ()
        return e

    def failed() -> int:
        return (RESULTS / "5-analysis" / "judged.jsonl").read_text().count("server_error")

    seen: list[str] = []

    def plan(content: str, attempt: int) -> str | None:
        seen.extend([] if content in seen else [content])
        return "500" if seen.index(content) < 2 else None

    server.plan = plan

    def analysing(e: Experiment) -> pipeline.Run:
        return pipeline.Run(e, [stage.name for stage in pipeline.STAGES[:5]])

    analysing(of_replies(allow_unanswered=True)).run()
    assert failed() == 2 and not analysing(of_replies()).done(ANALYSIS)
    assert analysing(of_replies(allow_unanswered=True)).done(ANALYSIS)
    server.plan = lambda content, attempt: None
    analysing(of_replies()).run()
    assert failed() == 0 and analysing(of_replies()).done(ANALYSIS)


def test_leave_for_gaps_that_was_not_needed_changes_nothing(server: FaultServer) -> None:
    run(experiment(server.base_url, allow_unanswered=True))
    assert labelled(made(server))
    assert made(server).inputs == made(server, allow_unanswered=True).inputs


@pytest.mark.parametrize(
    ("fault", "why", "detail"),
    [("too_long", "bad_request", "HTTP 400.*maximum context"), ("chat", "unlabelled_reply", "I would rather not")],
)
def test_a_judge_that_labels_nothing_leaves_the_stage_open(
    server: FaultServer, fault: str, why: str, detail: str
) -> None:
    """For instance an endpoint that says by HTTP 400 that the credit is used up, or a model that only chats."""
    server.plan = lambda content, attempt: fault
    for _ in range(2):
        with pytest.raises(JudgeStopped, match=rf"labelled none of 12 traces \(12 {why}\).*{detail}.*is kept"):
            run(experiment(server.base_url, allow_unanswered=True))
    assert set(server.paid.values()) <= {1} and not (RESULTS / "2-annotations" / "DONE").exists()


def no_endpoint() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong_key", "refuses the key in the environment variable OPENAI_API_KEY"),
        ("unknown_model", "has no model 'judge-1'"),
        ("quota", "out of money or over its quota"),
        ("max_cost", r"max_cost of \$0.004 is reached"),
        ("run_timeout", "run_timeout of 1 s has passed"),
    ],
)
def test_a_stop_keeps_what_was_paid_and_the_same_command_goes_on(server: FaultServer, fault: str, message: str) -> None:
    changes: dict[str, Any] = {"concurrency": 2}
    if fault == "max_cost":
        changes |= {"max_cost": 0.004, "input_price": 1.0, "output_price": 1.0}  # 1100 micro-dollars a call
    elif fault == "run_timeout":
        server.latency, changes["run_timeout"] = 0.2, 1.0  # ten calls, fewer on a slow machine
    else:
        server.plan = lambda content, attempt: fault if server.paid.total() >= 4 else None
    with pytest.raises(JudgeStopped, match=message) as stopped:
        run(experiment(server.base_url, **changes))
    assert KEY not in str(stopped.value) and re.search(r"\[\d+ of 12 traces are done\]", str(stopped.value))
    paid = server.paid.total()
    assert (1 if fault == "run_timeout" else 4) <= paid < 12 and len(read_entries(LEDGER)) == paid
    server.plan, server.latency = lambda content, attempt: None, 0.0
    run(experiment(server.base_url, **changes | {"max_cost": 0.0, "run_timeout": 0.0}))
    assert set(server.paid.values()) == {1} and server.paid.total() == 12 and reasons() == {}


def test_without_a_key_or_an_endpoint(monkeypatch: pytest.MonkeyPatch, server: FaultServer) -> None:
    with pytest.raises(JudgeStopped, match=r"cannot be reached .*Check base_url, and that the server runs"):
        run(experiment(no_endpoint()))
    shutil.rmtree("results")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(JudgeStopped, match=r"OPENAI_API_KEY is not set.*'keyword', which needs neither key nor"):
        run(experiment(server.base_url))
    assert server.seen == [] and not Path("results").exists()  # before stage 1, which may take hours


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    started = [sys.executable, "-m", "backtrack_jax.run", f"--config={TINY}", "--stages=traces,annotations", *arguments]
    return subprocess.run(started, env=os.environ | environment, capture_output=True, text=True)


def flags_of(base_url: str, **changes: object) -> list[str]:
    given = {"base_url": base_url, "model": "judge-1", "concurrency": 2} | changes
    return ["--config.annotations.judge=openai", *(f"--config.annotations.openai.{k}={v}" for k, v in given.items())]


def test_the_command_says_in_one_message_what_to_do(server: FaultServer) -> None:
    server.plan = lambda content, attempt: "wrong_key"
    done = command(*flags_of(server.base_url))
    assert done.returncode == 1 and "Traceback" not in done.stderr and KEY not in done.stderr + done.stdout
    assert re.search(
        r"^error: .*refuses the key.*the same command again to resume \[0 of 12", done.stderr, re.MULTILINE
    )


@pytest.mark.slow
def test_sigkill_at_a_random_moment_pays_again_for_nothing_but_calls_in_flight(server: FaultServer) -> None:
    server.latency = 0.05
    reached, at = threading.Event(), random.randint(1, 9)
    server.on_paid = lambda count: reached.set() if count >= at else None
    arguments = ["--config.annotations.openai.input_price=1", "--config.annotations.openai.output_price=1"]
    started = [
        sys.executable,
        "-m",
        "backtrack_jax.run",
        f"--config={TINY}",
        "--stages=1,2",
        *flags_of(server.base_url),
    ]
    process = subprocess.Popen([*started, *arguments], stderr=subprocess.DEVNULL)
    assert reached.wait(120)
    process.send_signal(signal.SIGKILL)
    process.wait()
    recorded = len(read_entries(LEDGER))
    assert 0 <= recorded <= 12 and not (RESULTS / "2-annotations" / "DONE").exists()
    server.on_paid = lambda count: None
    done = command(*flags_of(server.base_url), *arguments)
    assert done.returncode == 0, done.stderr
    assert "HTTP Request" not in done.stderr
    assert f"{12 - recorded} paid, {recorded} from the ledger" in done.stderr
    assert re.search(r"asking judge-1: 12 of 12 rows, .* tokens/s, \$0\.\d{4}, .* left", done.stderr)
    assert 12 <= server.paid.total() <= 12 + 2  # of the two that were in flight
    killed = annotations()
    shutil.rmtree("results")
    run(experiment(server.base_url))
    assert annotations() == killed and reasons() == {}


def test_the_key_is_in_no_artifact(server: FaultServer) -> None:
    server.plan = lambda content, attempt: "500" if attempt == 0 else None
    run(experiment(server.base_url))
    files = [path for path in Path("results").rglob("*") if path.is_file()]
    assert {"judge-ledger.jsonl", "annotations.jsonl", "run.json"} <= {path.name for path in files}
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    entry = next(iter(read_entries(LEDGER).values()))
    assert entry["system_fingerprint"] == "fp_1" and entry["answer"] and entry["parameters"]["seed"] == 0


def planned(e: Experiment) -> str:
    return plan.describe(pipeline.Run(e, ("1-traces", "2-annotations")))


def test_the_plan_estimates_calls_tokens_and_cost_without_a_key(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = {"input_price": 2.5, "output_price": 10.0}
    e = experiment(server.base_url, **prices)
    e.traces.limit = 5
    run(e)
    monkeypatch.delenv("OPENAI_API_KEY")
    e.traces.limit = 0
    text = planned(e)
    assert f"judge: judge-1 at {server.base_url}, 1 vote(s) a trace, format sentences" in text
    asked = re.search(r"7 calls to pay, 5 in the ledger; about ([\d,]+) tokens of prompts .*; about \$\d", text)
    assert asked is not None
    shown = sum(len(m["content"]) for t in records.read_released(tiny.CHAINS)[0] for m in JudgePrompt().messages(t))
    assert int(asked[1].replace(",", "")) == pytest.approx(shown / 3.8 * 7 / 12, rel=0.05)
    assert "24 calls to pay, 0 in the ledger" in planned(experiment(server.base_url, votes=2, model="judge-2"))
    assert "cost unknown: give input_price and output_price" in planned(experiment(server.base_url))
    keyword = experiment(server.base_url)
    keyword.annotations.judge = "keyword"
    assert "by keyword; no calls, no model is held" in planned(keyword)
    assert len(server.seen) == 5


def test_the_plan_of_traces_that_are_not_sampled_yet(server: FaultServer) -> None:
    e = experiment(server.base_url)
    e.traces.path, e.traces.samples, e.traces.limit, e.traces.max_new_tokens = "", 2, 50, 400
    text = planned(e)
    assert "as if every reply were 400 tokens of reasoning" in text
    assert "100 calls to pay, 0 in the ledger" in text
    tokens = int(re.search(r"about ([\d,]+) tokens of prompts", text)[1].replace(",", ""))  # type: ignore[index]
    assert 400 * 100 < tokens < 1000 * 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"votes": 0}, r"annotations\.openai\.votes=0, expected at least 1"),
        ({"reask": -1}, r"annotations\.openai\.reask=-1, expected at least 0"),
        ({"format": "xml"}, "unknown format 'xml' of the judge's prompt; accepted: sentences, inline"),
        ({"backtracking": "any"}, "unknown backtracking 'any'"),
        ({"base_url": "localhost:8000"}, "base_url 'localhost:8000' is not an address"),
        ({"model": ""}, "model is empty"),
        ({"concurrency": 0}, "concurrency 0 must be at least 1"),
        ({"max_cost": 1.0}, "max_cost of the judge needs input_price and output_price"),
        ({"extra_body": "top_p=1"}, "extra_body='top_p=1' of the judge, expected a JSON object"),
        ({"extra_body": "[1]"}, "expected a JSON object"),
    ],
)
def test_settings_that_cannot_run_are_named_before_anything_is_done(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        checks.check(experiment(**{"base_url": "http://host/v1"} | changes))
    assert len(str(error.value).splitlines()) == 2


def test_numbers_below_their_range_are_left_out_of_the_request() -> None:
    spec = OpenAISpec(temperature=-1.0, seed=-1, max_tokens=0, extra_body='{"reasoning_effort": "low"}')
    assert request(spec, [], 3) == {"model": spec.model, "messages": [], "reasoning_effort": "low"}
    given = {"temperature": 0.0, "seed": 3, "max_tokens": 4096}
    assert request(OpenAISpec(), [], 3) == {"model": spec.model, "messages": [], **given}


@pytest.mark.parametrize(
    ("judge", "path", "resolved"),
    [
        ("released-or-openai", "chains.json", "released"),
        ("released-or-openai", "folder", "released"),
        ("released-or-openai", "traces.jsonl", "openai"),
        ("released-or-keyword", "", "keyword"),
        ("openai", "chains.json", "openai"),
    ],
)
def test_released_or_asks_the_judge_only_where_no_labels_came(judge: str, path: str, resolved: str) -> None:
    e = tiny.get_config()
    e.annotations.judge, e.traces.path = judge, path
    assert trace_judge(e) == resolved


def test_a_run_that_reads_vectors_takes_the_stand_in() -> None:
    """Stages 1 and 2 alone sample; each of the two ways keeps its results when the other one is run."""
    e = tiny.get_config()
    e.traces.path, e.traces.stand_in, e.annotations.judge = "", tiny.CHAINS, "released-or-keyword"
    checks.check(e)  # kinds that only the stand-in has labels for
    alone, whole = (
        pipeline.Run(e, ("1-traces", "2-annotations")),
        pipeline.Run(e, ("1-traces", "2-annotations", "3-vectors")),
    )
    assert (alone.experiment.traces.path, trace_judge(alone.experiment)) == ("", "keyword")
    assert (whole.experiment.traces.path, trace_judge(whole.experiment)) == (tiny.CHAINS, "released")
    assert alone.inputs["1-traces"] != whole.inputs["1-traces"] and e.traces.path == ""
    e.traces.path = "other.json"
    assert e.for_vectors().traces.path == "other.json"
    e.traces.path, e.traces.stand_in = "", ""
    with pytest.raises(ValueError, match=r"steering\.kinds='deduction'"):
        checks.check(e)


# Stage 5: the judge on steered replies


def with_replies(base_url: str) -> Experiment:
    """A run in which the online judge reads steered replies, and nothing else."""
    e = experiment(base_url, input_price=1.0, output_price=1.0)
    e.annotations.judge, e.analysis.judge = "released", "openai"
    e.steering = dataclasses.replace(e.steering, kinds=("backtracking",), baselines=(), offsets=(), layers=())
    return e


def test_the_judge_reads_steered_replies(server: FaultServer) -> None:
    e = with_replies(server.base_url)
    pipeline.Run(e).run()
    folder = RESULTS / "5-analysis"
    lines = store.read_lines(RESULTS / "4-steering" / "generations.jsonl")
    judged = records.read_annotations(folder / "judged.jsonl")
    assert len(judged) == len(lines)
    for cell in tables.read(folder / "rates.csv"):
        flags = []
        for line, annotation in zip(lines, judged, strict=True):
            if all(line[name] == cell[name] for name in ("target", "kind", "source", "magnitude")):
                for start, stop in split_sentences(line["text"][: reasoning_end(line["text"])]):
                    given = {s.label for s in annotation.sections if s.start < stop and start < s.stop}
                    flags += ["backtracking" in given] if given else []
        assert cell["judge_rate"] == pytest.approx(sum(flags) / len(flags), abs=1e-6)
    groups = [row["group"] for row in tables.read(folder / "judge_agreement.csv")]
    assert groups == ["all", "0", "-4", "8"]
    (judges,) = (
        line for line in (RESULTS / "6-report" / "summary.md").read_text().split("\n") if line.startswith("| Table C.1")
    )
    assert re.fullmatch(r"(.+ / .+ / .+ at magnitude (0|-4|8)(; )?){3}", judges.split(" | ")[-1].removesuffix(" |"))
    paid = server.paid.total()
    assert 0 < paid <= len(lines)
    shutil.rmtree(RESULTS)
    pipeline.Run(e).run()
    assert server.paid.total() == paid


def test_the_plan_estimates_the_judging_of_replies(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    e = with_replies(server.base_url)
    text = plan.describe(pipeline.Run(e))
    replies = 2 * (1 + 2 * 2) * 3 * 2  # models x (unsteered + sources x magnitudes) x problems x samples
    assert f"as if every reply were {e.steering.max_new_tokens} tokens" in text and f"{replies} calls to pay" in text
    with pytest.raises(JudgeStopped, match="OPENAI_API_KEY"):  # before the first stage
        pipeline.Run(e).run()
    assert not RESULTS.exists()


def labels_of_a_file(tmp_path: Path, trace: records.Trace, *sections: records.Section) -> records.Annotation:
    """What stage 2 makes of imported labels of one trace, with a note on each of them."""
    notes = tuple(records.Note("fuzzy", index) for index in range(len(sections)))
    records.write_jsonl(tmp_path / "mine.jsonl", [records.Annotation(trace.id, "me", sections, (), notes)])
    e = tiny.get_config()
    e.annotations.judge, e.annotations.path = "import", str(tmp_path / "mine.jsonl")
    (annotation,) = imported.JUDGE.annotate(e, [trace])
    return annotation


def test_imported_sections_behind_the_reasoning_are_counted_as_rejected(tmp_path: Path) -> None:
    text = "<think>\nSo. Wait.\n</think>\n\nTwelve. Wait."
    trace = records.Trace("p/0", "p", "c", "q", text)
    first, late = text.index("Wait"), text.rindex("Wait")
    kept, behind = (records.Section("backtracking", start, start + 5) for start in (first, late))
    annotation = labels_of_a_file(tmp_path, trace, kept, behind)
    assert annotation.sections == (kept,) and annotation.notes == (records.Note("fuzzy", 0),)
    assert annotation.rejected == (records.Rejection(Reason.AFTER_END, "backtracking", "Wait."),)
    with pytest.raises(ValueError, match="not a span of its text"):
        labels_of_a_file(tmp_path, trace, records.Section("backtracking", late, len(text) + 1))


def test_imported_spans_that_count_bytes_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Caf\u00e9 is 5 \u20ac. Wait, no. \u4f60\u597d."
    trace = records.Trace("p/0", "p", "c", "q", text)
    start, chinese = text.index("Wait"), text.index("\u597d")
    in_bytes = len(text[:start].encode())
    labels_of_a_file(tmp_path, trace, *(records.Section("backtracking", n, n + 1) for n in (0, in_bytes, chinese)))
    said = capsys.readouterr().err
    assert "1 of 3 sections start inside a word; spans count characters, not bytes" in said
    labels_of_a_file(tmp_path, trace, *(records.Section("backtracking", n, n + 1) for n in (0, start, chinese)))
    assert "inside a word" not in capsys.readouterr().err
