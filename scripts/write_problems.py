"""Has an OpenAI-compatible model write more problems, in the categories of those that ship with the program.

    python scripts/write_problems.py --out=problems.jsonl --per_category=30 --dry_run
    python scripts/write_problems.py --out=problems.jsonl --categories=spatial,causal --model=MODEL \\
        --base_url=http://localhost:8000/v1
    python -m backtrack_jax.run --config=configs/paper.py --config.traces.problems=problems.jsonl

The endpoint is set by the same names as that of the online judge (`--max_cost=2`; see `config.OpenAISpec`);
its key is read from the environment. Every answer that was paid for is kept in a ledger beside the output: a killed or
stopped run resumes with the same command, and more problems of a category cost only the additional calls.

A problem is taken if it shares no run of eight words with a shipped one or with one taken before. Ids continue
from those of the shipped problems, so that both files can be joined.
"""

import asyncio
import dataclasses
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from backtrack_jax.config import OpenAISpec
from backtrack_jax.data.problems import CATEGORIES, shipped_problems
from backtrack_jax.data.records import Problem, write_jsonl
from backtrack_jax.files.console import Progress, say
from backtrack_jax.judges.openai import settings
from backtrack_jax.judges.openai.client import ChatClient
from backtrack_jax.judges.openai.judge import CHARACTERS_PER_TOKEN
from backtrack_jax.judges.openai.ledger import Entry, Ledger, content_key, read_entries
from backtrack_jax.judges.openai.settings import CallFailed, JudgeStopped

PER_CALL = 10
RUN_OF_WORDS = 8  # two problems that share so many words in a row are variants of each other
FIRST_NUMBER = 30  # the shipped problems of a category are numbered 0 to 29
WORDS = (10, 150)
_SPARE_SETS = 3  # more sets of a category than its problems need, for those that are not taken
_TOKENS_PER_PROBLEM = 70

KINDS = {
    "math_logic": "number puzzles, counting, short proofs, knights and knaves, deductions from statements",
    "spatial": "solids and nets, rotations, maps and routes, views of objects, dissections of figures",
    "verbal": "analogies, hidden meanings, ambiguous sentences, word puzzles, implications of a text",
    "pattern": "sequences, grids and codes whose rule has to be found and carried on",
    "lateral": "odd situations with a surprising but sound explanation, constraints that must be read anew",
    "causal": "what caused what, what would have happened otherwise, confounders, wrong explanations",
    "probability": "chances, expected values, conditional probability, misleading statistics",
    "systems": "feedback, queues, stocks and flows, incentives, what a change does to the whole",
    "creative": "designs and inventions under constraints that can be checked",
    "scientific": "explaining an observation, planning an experiment, estimating a quantity, judging evidence",
}
"""What a category is about, in the words of the request."""

INSTRUCTIONS = """\
You write problems that make a careful reader reason in several steps: an approach suggests itself, may fail, and has to
be checked. Every problem is complete in itself, needs no picture, can be answered in writing, and takes one to four
sentences of plain text. No two problems of a set have the same idea, names or numbers. Answer with JSON alone:

{"problems":["<problem>","<problem>",...]}
"""

SCHEMA = {
    "type": "object",
    "properties": {"problems": {"type": "array", "items": {"type": "string"}}},
    "required": ["problems"],
    "additionalProperties": False,
}

FLAGS = flags.FLAGS
flags.DEFINE_string("out", None, "JSONL file of problems to write.", required=True)
flags.DEFINE_list("categories", ",".join(CATEGORIES), "Categories to write problems for.")
flags.DEFINE_integer("per_category", 30, "Problems of each category.", lower_bound=1)
flags.DEFINE_bool("dry_run", False, "Print calls, tokens and estimated cost, and stop.")
_DEFINE = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
_OF_LABELS = ("format", "backtracking", "response_format", "votes", "reask", "allow_unanswered")
ENDPOINT = {
    name: _DEFINE[type(default)](name, default, f"As annotations.openai.{name} of a config.")
    for name, default in dataclasses.asdict(OpenAISpec(temperature=1.0)).items()
    if name not in _OF_LABELS
}


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --model=NAME")
    categories = list(dict.fromkeys(FLAGS.categories))
    if not categories:
        raise app.UsageError(f"--categories: none is named; accepted: {', '.join(KINDS)}")
    if unknown := [name for name in FLAGS.categories if name not in KINDS]:
        raise app.UsageError(f"--categories: {unknown} unknown; accepted: {', '.join(KINDS)}")
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)  # which logs every request
    out = Path(FLAGS.out)
    if out.suffix != ".jsonl":
        raise app.UsageError(f"--out={out}: the file is JSONL and must be named so, e.g. problems.jsonl")
    spec = OpenAISpec(**{name: flag.value for name, flag in ENDPOINT.items()})
    ledger = Path(spec.ledger).expanduser() if spec.ledger else out.with_suffix(".ledger.jsonl")
    try:
        settings.check(spec)
        if FLAGS.dry_run:
            print(estimate(spec, categories, FLAGS.per_category, ledger))
            return
        writer = asyncio.run(write(spec, categories, FLAGS.per_category, ledger))
    except (ValueError, OSError, JudgeStopped) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes where this run left off")
    problems = writer.problems()
    missing = ", ".join(f"{n} of {name}" for name, n in writer.missing.items() if n > 0)
    refused = ", ".join(f"{count} {reason}" for reason, count in writer.refused.items()) or "none"
    # A run that failed may have less than one before it.
    if missing and len(problems) <= (there := lines_in(out)):
        say(f"{len(problems)} problems, not taken: {refused}; {out} is left as it was, with {there}")
    else:
        write_jsonl(out, problems)
        say(f"{len(problems)} problems are in {out}; not taken: {refused}")
    if missing:
        sys.exit(
            f"error: too few could be used, {missing} are missing; the same command asks again where a call failed"
        )


def lines_in(path: Path) -> int:
    """Non-empty lines; 0 where there is no such file."""
    return sum(bool(line.strip()) for line in path.read_bytes().split(b"\n")) if path.exists() else 0


class Writer:
    """The problems of every category, as they are taken.

    Attributes:
      taken: category -> texts.
      refused: reason -> how many problems or whole answers were not taken.
    """

    def __init__(self, categories: Iterable[str], per_category: int) -> None:
        self.taken: dict[str, list[str]] = {name: [] for name in categories}
        self.refused: Counter[str] = Counter()
        self._per_category = per_category
        self._runs = set().union(*(runs_of_words(problem.problem) for problem in shipped_problems()))

    @property
    def missing(self) -> dict[str, int]:
        """Category -> how many problems it still needs."""
        return {name: self._per_category - len(texts) for name, texts in self.taken.items()}

    def read(self, category: str, entry: Entry) -> None:
        """Takes what can be used of an answer."""
        found = problems_in(entry)
        if isinstance(found, str):
            self.refused[found] += 1
            return
        for text in (" ".join(problem.split()) for problem in found):
            runs = runs_of_words(text)
            if not WORDS[0] <= len(text.split()) <= WORDS[1]:
                self.refused["length"] += 1
            elif runs & self._runs:
                self.refused["variant"] += 1
            elif self.missing[category] > 0:
                self.taken[category].append(text)
                self._runs |= runs

    def problems(self) -> list[Problem]:
        """All that were taken, by category and number."""
        return [
            Problem(f"{name}_{number:02d}", name, text)
            for name, texts in self.taken.items()
            for number, text in enumerate(texts, FIRST_NUMBER)
        ]


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    """Every run of `RUN_OF_WORDS` words of a text, without case and punctuation; all its words if it has fewer."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {tuple(words[i : i + RUN_OF_WORDS]) for i in range(max(1, len(words) - RUN_OF_WORDS + 1))}


def problems_in(entry: Entry) -> list[str] | str:
    """The problems of an answer, or why it holds none."""
    answer: str = entry["answer"]
    if entry["refusal"] or entry["finish_reason"] == "content_filter":
        return "refused answer"
    if entry["finish_reason"] == "length":
        return "truncated answer"
    try:
        found = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])["problems"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "unusable answer"
    return found if isinstance(found, list) and all(isinstance(text, str) for text in found) else "unusable answer"


def request(spec: OpenAISpec, category: str, number: int) -> dict[str, Any]:
    """The request for set `number` of a category."""
    kind = f"Category: {category.replace('_', ' ')} ({KINDS[category]})."
    question = (
        f"{kind}\nWrite {PER_CALL} problems of this category. This is set {number + 1}; sets differ in their ideas."
    )
    messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": question}]
    schema = {"name": "problems", "strict": True, "schema": SCHEMA}
    return settings.request(spec, messages, number, response_format={"type": "json_schema", "json_schema": schema})


def sets_for(n: int) -> int:
    """Calls that n problems take, if all of them can be used."""
    return -(-n // PER_CALL)


async def write(spec: OpenAISpec, categories: Sequence[str], per_category: int, ledger_path: Path) -> Writer:
    """Asks until every category has its problems, or has had `_SPARE_SETS` more sets than they need.

    Raises:
      JudgeStopped: no call can succeed, or a limit was reached; what was paid for is in the ledger.
    """
    writer = Writer(categories, per_category)
    asked = dict.fromkeys(categories, 0)
    most = sets_for(per_category) + _SPARE_SETS
    with (
        Ledger(ledger_path) as ledger,
        Progress(f"asking {spec.model}", len(categories) * per_category) as progress,
    ):
        async with ChatClient(spec, ledger) as client:
            while todo := _next_sets(writer.missing, asked, most):
                before, tokens = sum(map(len, writer.taken.values())), client.meter.completion_tokens
                answers = await asyncio.gather(
                    *(client.complete(request(spec, *one), one[1], category=one[0]) for one in todo),
                    return_exceptions=True,
                )
                for (category, _), answer in zip(todo, answers, strict=True):
                    asked[category] += 1
                    if isinstance(answer, CallFailed):
                        writer.refused[answer.fault] += 1
                    elif isinstance(answer, BaseException):
                        raise answer
                    else:
                        writer.read(category, answer)
                rows = sum(map(len, writer.taken.values())) - before
                progress.update(rows, client.meter.completion_tokens - tokens, note=str(client.meter))
    return writer


def _next_sets(missing: dict[str, int], asked: dict[str, int], most: int) -> list[tuple[str, int]]:
    """(category, number) of the sets to ask for now."""
    return [
        (category, number)
        for category, n in missing.items()
        for number in range(asked[category], min(asked[category] + sets_for(max(n, 0)), most))
    ]


def estimate(spec: OpenAISpec, categories: Sequence[str], per_category: int, ledger_path: Path) -> str:
    """Calls, tokens and cost, if all that is written can be used."""
    known = read_entries(ledger_path)
    todo = [(request(spec, name, n), n) for name in categories for n in range(sets_for(per_category))]
    new = [body for body, number in todo if content_key(body, number) not in known]
    prompt = round(sum(len(m["content"]) for body in new for m in body["messages"]) / CHARACTERS_PER_TOKEN)
    answers = len(new) * PER_CALL * _TOKENS_PER_PROBLEM
    cost = settings.cost_of(spec, prompt, answers)
    return (
        f"{len(new)} calls to pay, {len(todo) - len(new)} in the ledger; about {prompt:,} tokens of prompts and "
        f"{answers:,} of answers; "
        + ("cost unknown: give input_price and output_price" if cost is None else f"about ${cost:.2f}")
    )


if __name__ == "__main__":
    app.run(main)
