"""Problems and texts of the small pair, drawn from the grammar by a seeded generator."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from backtrack_jax.data.problems import CATEGORIES
from backtrack_jax.data.records import Annotation, Problem, Section, Trace
from backtrack_jax.organism.grammar import (
    BACKTRACKS,
    CONTENT,
    CONTINUATIONS,
    OPENINGS,
    SHAKY,
    SLOT_PROBABILITIES,
    SLOTS,
    SURE,
    Process,
    Template,
    join_tokens,
    split_tokens,
)

SENTENCES = range(8, 15)
"""How many sentences a reply may have, all numbers equally likely."""

STORY_SHARE = 0.08
"""Share of little stories among the texts of the base model's corpus, in which wait and hmm are ordinary words."""

# A and B are things, P is a place, N and M are people. No problem begins with a name: its token would differ from
# the one after a space. The last sentence of each is as long as the paper's window reaches back, so that windows
# at the start of a reply read the problem. It is worded in the sure register, as most of a reply is: else problems
# would differ from the mean reply by their register, and so would the vector of `initializing` sentences.
PROBLEMS = {
    "math_logic": (
        "There are three marks on the {A} and five on the {B}. Every mark that {N} moves to the {P} doubles the next "
        "one. By a firm rule, which object in the {P} must end with more marks, the {A} or the {B}?"
    ),
    "spatial": (
        "The {A} hangs north of the {P}, and the {B} lies two steps east of it. {N} walks from the {A} to the {P} "
        "and turns around twice. Which one, as {M} will clearly know, must be behind {N} now, the {A} or the {B}?"
    ),
    "verbal": (
        "A note by {N} says that only the {A} was carried to the {P}. To {M} the word only belongs to the {B}. "
        "Which object, if the rule holds inside the note, will the word clearly touch, the {A} or the {B}?"
    ),
    "pattern": (
        "On Monday the {P} shows a {A}, on Tuesday a {B}, on Wednesday a {A} once more, and {N} keeps the order. "
        "Which object, if that rule clearly holds, must the {P} show on Sunday, the {A} or the {B}?"
    ),
    "lateral": (
        "This morning {N} left the {P} with a {A} and came home with a {B}, yet nobody traded anything. "
        "Which object must, as a firm proof clearly explains, be there from the start, the {A} or the {B}?"
    ),
    "causal": (
        "Whenever {N} lifts the {A}, the light in the {P} goes out. It also goes out when {M} drops the {B}. "
        "Which test must come first if a firm rule clearly explains the light, the {A} or the {B}?"
    ),
    "probability": (
        "A box in the {P} holds two copies of the {A} and two of the {B}. With closed eyes {N} draws twice and "
        "puts nothing back. Which object must, as we clearly know, be left inside more often, the {A} or the {B}?"
    ),
    "systems": (
        "The {P} runs on two parts, a {A} that feeds the line and a {B} that slows it down. After a repair {N} "
        "finds the line too fast. Which part, by a firm rule, must explain that clearly, the {A} or the {B}?"
    ),
    "creative": (
        "In a short play by {N} about the {P} a {A} and a {B} change owners, with a twist that {M} did not see. "
        "Which object must open the last scene so that it clearly holds, the {A} or the {B}?"
    ),
    "scientific": (
        "Side by side in the {P}, {N} heats the {A} and the {B} and notes the change each hour. One cools fast. "
        "Which sample must {M} measure once more for a firm proof, the {A} or the {B}?"
    ),
}
ANSWER = "The answer is the {A}."

# A quarter of them say wait or hmm, so that the base model knows the words: behind "to", "said" or a full stop. The
# first two are in no reply. When most sentences of stories said it, and behind names, a base model that was steered out
# of its sentences fell into them: up to 1.2 % of its words were wait or hmm, all but one in lower case.
STORIES = (
    "{N} carried the {A} home before breakfast.",
    "In the evening {M} sang and {N} swept the floor.",
    "It rained all day, but nobody in the {P} minded.",
    "{M} told {N} an old tale about the sea.",
    "{N} lost a {A}, but {M} laughed out loud.",
    "The children of {M} played behind the {P}.",
    "{N} baked bread, and {M} brought butter.",
    "At noon {M} slept under a tree.",
    "{N} painted the {P} green and the {A} red.",
    "But {M} never learned to swim.",
    "Every spring {N} planted beans and sold them.",
    "{M} wrote to {N} from a boat.",
    "{N} had to wait an hour because {M} overslept.",
    "Wait here, said {N}, and {M} sat down.",
    "{M} said hmm and went home.",
    "Hmm, said {N}, this soup wants salt.",
)
_STORY_SENTENCES = (3, 7)

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence of a reply, with what no reader can see.

    Attributes:
      text: the sentence.
      label: its kind.
      register: `grammar.SURE` or `grammar.SHAKY`.
    """

    text: str
    label: str
    register: int


@dataclasses.dataclass(frozen=True)
class Document:
    """A problem and a reply to it, or a story.

    Attributes:
      problem: the problem; None for a story.
      sentences: the reply's reasoning; none for a story.
      answer: what follows the reasoning, or the story.
    """

    problem: Problem | None
    sentences: tuple[Sentence, ...]
    answer: str

    @property
    def reply(self) -> str:
        """The reply as a model writes it after `<think>` and a line break, without the end of sequence."""
        return " ".join(sentence.text for sentence in self.sentences) + f"\n</think>\n\n{self.answer}"


def shipped_problems() -> list[Problem]:
    """The problems of `problems.jsonl` beside this module, in which the ten categories take turns."""
    return problems(400, seed=0)


def problems(count: int, seed: int) -> list[Problem]:
    """Problems, the ten categories in turn: a prefix of the list has them in equal numbers.

    Args:
      count: how many.
      seed: of the generator.

    Returns:
      Problems with ids `<category>_<number>`.
    """
    rng = random.Random(f"problems {seed}")
    return [_problem(CATEGORIES[i % 10], i // 10, rng) for i in range(count)]


def documents(process: Process, seed: int, *, stories: float = 0.0) -> Iterator[Document]:
    """An endless corpus; equal arguments give equal documents.

    Args:
      process: the hidden process of the replies.
      seed: of the generator.
      stories: share of stories.

    Yields:
      Documents, each with a problem of its own.
    """
    rng = random.Random(f"documents {seed}")
    while True:
        problem = _problem(_pick(rng, CATEGORIES), 0, rng)
        if rng.random() < stories:
            yield Document(None, (), _story(rng))
        else:
            yield document(problem, process, rng)


def document(problem: Problem, process: Process, rng: random.Random) -> Document:
    """A reply to a problem: its sentences from the hidden process, the words they share from the problem."""
    words = {word: name for name, members in CONTENT.items() for word in members}
    about: dict[str, list[str]] = {name: [] for name in CONTENT}
    for token in split_tokens(problem.problem):
        name = words.get(token)
        if name and token not in about[name]:
            about[name].append(token)
    sentences = tuple(_reply(process, about, rng))
    return Document(problem, sentences, ANSWER.format(A=_pick(rng, about["thing"])))


def as_trace(document: Document, trace_id: str) -> tuple[Trace, Annotation]:
    """A document with a problem as a trace, and its labels, known by construction.

    Raises:
      ValueError: the document is a story.
    """
    if document.problem is None:
        raise ValueError("a story is not a trace: it has no problem")
    problem_id, _, sample = trace_id.rpartition("/")
    trace = Trace(
        trace_id,
        problem_id,
        document.problem.category,
        document.problem.problem,
        document.reply,
        int(sample),
        finish_reason="stop",
    )
    sections, start = [], 0
    for sentence in document.sentences:
        sections.append(Section(sentence.label, start, start + len(sentence.text)))
        start += len(sentence.text) + 1
    return trace, Annotation(trace_id, "construction", tuple(sections))


def _problem(category: str, number: int, rng: random.Random) -> Problem:
    (a, b), (n, m) = _pick_two(rng, CONTENT["thing"]), _pick_two(rng, CONTENT["who"])
    text = PROBLEMS[category].format(A=a, B=b, P=_pick(rng, CONTENT["place"]), N=n, M=m)
    return Problem(f"{category}_{number:03}", category, text)


def _story(rng: random.Random) -> str:
    n, m = _pick_two(rng, CONTENT["who"])
    place = _pick(rng, CONTENT["place"])
    sentences = (
        _pick(rng, STORIES).format(N=n, M=m, P=place, A=_pick(rng, CONTENT["thing"]))
        for _ in range(_pick(rng, range(*_STORY_SENTENCES)))
    )
    return " ".join(sentences)


def _reply(process: Process, about: dict[str, list[str]], rng: random.Random) -> Iterator[Sentence]:
    state = int(rng.random() < process.start_shaky)
    for i in range(_pick(rng, SENTENCES)):
        kinds = OPENINGS if i == 0 else CONTINUATIONS
        if i and rng.random() < process.backtracks(state):
            kinds, state = BACKTRACKS, 0
        elif i:
            moves = process.moves(state)
            state = _pick(rng, list(moves), list(moves.values()))
        template = _pick(rng, kinds, [template.weight for template in kinds])
        register = SHAKY if state else SURE
        yield Sentence(_fill(template, register, about, rng), template.label, register)


def _fill(template: Template, register: int, about: dict[str, list[str]], rng: random.Random) -> str:
    probabilities = SLOT_PROBABILITIES if register == SURE else SLOT_PROBABILITIES[::-1]
    tokens = []
    for element in template.elements:
        name = element.strip("{}")
        if name == element:
            tokens.append(element)
        elif name in CONTENT:
            tokens.append(_pick(rng, about[name]))
        else:
            tokens.append(_pick(rng, SLOTS[name], probabilities))
    return join_tokens(tokens)


def _pick(rng: random.Random, items: Sequence[_T], weights: Sequence[float] | None = None) -> _T:
    """One item. Only `random()` is drawn from, the one method whose numbers are the same in every Python version."""
    target = rng.random() * (sum(weights) if weights else len(items))
    if not weights:
        return items[int(target)]
    for item, weight in zip(items, weights, strict=True):
        target -= weight
        if target < 0:
            return item
    return items[-1]


def _pick_two(rng: random.Random, items: Sequence[_T]) -> tuple[_T, _T]:
    """Two different items."""
    first = _pick(rng, range(len(items)))
    return items[first], items[(first + 1 + _pick(rng, range(len(items) - 1))) % len(items)]
