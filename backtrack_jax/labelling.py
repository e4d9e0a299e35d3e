"""Who labels: the list of judges, and which of them an experiment has asked for."""

from backtrack_jax.config import Experiment
from backtrack_jax.judges import imported, keyword, released
from backtrack_jax.judges.base import RELEASED_OR, Judge, trace_judge
from backtrack_jax.judges.openai import online
from backtrack_jax.organism import judge as grammar

JUDGES: tuple[Judge, ...] = (released.JUDGE, keyword.JUDGE, grammar.JUDGE, online.JUDGE, imported.JUDGE)
"""Every judge that a config can name."""


def trace_judges() -> tuple[str, ...]:
    """What `annotations.judge` may be: every judge, and `released-or-` with those that read a text."""
    return (*(judge.name for judge in JUDGES), *(RELEASED_OR + judge.name for judge in JUDGES if judge.reads_text))


def reply_judges() -> tuple[str, ...]:
    """What `analysis.judge` may be: nobody, or a judge that labels replies too."""
    return ("", *(judge.name for judge in JUDGES if judge.on_replies))


def judge_named(name: str) -> Judge:
    """The judge with this name.

    Raises:
      ValueError: there is none; lists the judges that exist.
    """
    named = {judge.name: judge for judge in JUDGES}
    if name not in named:
        raise ValueError(f"unknown judge {name!r}; accepted: {', '.join(named)}")
    return named[name]


def judge_of(e: Experiment) -> Judge:
    """The judge of the traces, `released-or-...` resolved; ValueError if there is none with that name."""
    return judge_named(trace_judge(e))


def judge_of_replies(e: Experiment) -> Judge | None:
    """The judge of the steered replies, None if nobody labels them; ValueError if there is none with that name."""
    return judge_named(e.analysis.judge) if e.analysis.judge else None
