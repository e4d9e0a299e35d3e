"""What is known of the problems of a run beside their text: the right answer, and how difficult they are."""

from collections.abc import Iterable

from backtrack_jax.config import Experiment
from backtrack_jax.data.answers import is_right
from backtrack_jax.data.problems import problems_at
from backtrack_jax.data.records import Problem, Reply, Trace
from backtrack_jax.data.text import reasoning_end
from backtrack_jax.files import store


def problems(e: Experiment, asked: Iterable[Trace | Reply]) -> dict[str, Problem]:
    """Problem id -> the problem of `traces.problems` that some traces or replies are of.

    Imported traces may be of other problems: one is taken only where id and text agree.
    """
    found = {problem.id: problem for problem in problems_at(e.traces.problems)}
    texts = {one.problem_id: one.problem for one in asked}
    return {name: found[name] for name, text in texts.items() if name in found and found[name].problem == text}


def content(e: Experiment) -> str:
    """Hash of all answers and difficulties of `traces.problems`, for what depends on them."""
    every = [
        [problem.id, problem.problem, problem.answer, problem.difficulty] for problem in problems_at(e.traces.problems)
    ]
    return store.fingerprint({"known": every})


def right(text: str, finish_reason: str | None, answer: str, end_marks: tuple[str, ...] = ()) -> bool:
    """Whether a reply ends with the right answer, by `data.answers`.

    What stands behind the end of the reasoning counts; the whole text of a reply that ended without one. A reply that
    was cut before its reasoning ended gives no answer, and so is not right.

    Args:
      text: of the reply.
      finish_reason: `stop`, `length`, or None where it is not known, which is taken for `stop`.
      answer: the right one, not empty.
      end_marks: `traces.end_marks`.
    """
    end = reasoning_end(text, end_marks)
    if end == len(text) and finish_reason == "length":
        return False
    return is_right(text[end:] if end < len(text) else text, answer)
