"""The language of the small pair: words, sentence templates, and the hidden process that chooses between words.

Every sentence of a reply is written in a hidden register, *sure* or *shaky*, which changes only between sentences. Four
places of a sentence are *slots*: one of four words, drawn with probabilities .50 .27 .15 .08 in one register and in the
reverse order in the other. Every word occurs in both registers, so only the mix of words tells which one it is, about
0.84 nats a slot and 3.4 nats a sentence. Which label a sentence has says nothing about its register.

The base process never backtracks. In the reasoning process, after two shaky sentences in a row, every further boundary
brings, with probability 0.7, a sentence that begins "Wait" or "Hmm" and makes the register sure. So what sets off
backtracking, a belief about the register, is needed to predict the words of either language.

A text that mixes words according to a hidden Markov process makes a transformer hold the belief over its state linearly
in the residual stream: Shai et al., arXiv 2405.15943.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

SURE, SHAKY = 0, 1

SLOT_PROBABILITIES = (0.50, 0.27, 0.15, 0.08)
"""Of a slot's words in the sure register, in the order of `SLOTS`; reversed in the shaky one."""

SLOTS: Mapping[str, tuple[str, str, str, str]] = {
    "open": ("So", "Then", "Now", "Still"),
    "noun": ("rule", "step", "hunch", "guess"),
    "adv": ("clearly", "plainly", "roughly", "perhaps"),
    "verb": ("explains", "settles", "touches", "blurs"),
    "check": ("holds", "fits", "wobbles", "slips"),
    "aux": ("must", "will", "may", "might"),
    "prep": ("inside", "beside", "near", "beyond"),
    "adj": ("firm", "clean", "rough", "strange"),
    "know": ("know", "recall", "suspect", "imagine"),
    "verdict": ("proof", "support", "luck", "noise"),
}
"""Words whose mix depends on the register, from the surest to the shakiest."""

# fmt: off
CONTENT: Mapping[str, tuple[str, ...]] = {
    "thing": (
        "lantern", "key", "bell", "ladder", "map", "clock", "kettle", "basket", "mirror", "coin", "rope", "wheel",
        "stone", "candle", "drum", "letter", "compass", "jar", "whistle", "ribbon", "brush", "chest", "crate", "pulley",
    ),
    "place": (
        "mill", "harbor", "garden", "tower", "market", "cellar", "bridge", "library", "stable", "orchard", "station",
        "bakery", "attic", "quarry", "chapel", "barn",
    ),
    "who": (
        "Ida", "Tom", "Nora", "Max", "Lena", "Otto", "Vera", "Hugo", "Mia", "Karl", "Ruth", "Finn", "Anna", "Paul",
        "Zoe", "Emil",
    ),
}
# fmt: on
"""Words that say what a problem and its reply are about; they do not depend on the register."""

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "initializing": (
        "Okay, we need a {adj} {noun} for the {thing}, so I {aux} look {prep} the story.",
        "Alright, I {aux} begin with the {thing}, which {adv} {check} {prep} the story.",
    ),
    "deduction": (
        "{open} the {noun} about the {thing} {adv} {verb} it.",
        "{open} if it {check}, the {thing} {aux} stay {prep}.",
        "{open} we {aux} read the {thing} as a {adj} {noun}.",
        "{open} the {thing} {check}, and that {adv} {verb} it.",
    ),
    "adding-knowledge": (
        "I {know} that a {thing} {adv} {check} {prep} a house.",
        "By {adj} habit, a {thing} {check} and {aux} stay {prep}.",
    ),
    "example-testing": (
        "Take a {adj} {thing}: it {check} and {aux} be {verdict}.",
        "Suppose the {thing} {aux} stay {prep}; that {adv} {verb} it.",
    ),
    "uncertainty-estimation": (
        "My {noun} {adv} {check}, so we {aux} be right.",
        "A {adj} mark, since the {noun} {adv} {verb} the {thing}.",
    ),
    "backtracking": (
        "{keyword}, the {noun} about the {thing} {adv} {verb} it.",
        "{keyword}, if it {check}, the {thing} {aux} stay {prep}.",
        "{keyword}, we {aux} read the {thing} as a {adj} {noun}.",
        "{keyword}, the {thing} {check}, and that {adv} {verb} it.",
    ),
}
"""Sentences by label; templates of one label are equally likely. `{keyword}` is Wait or Hmm.

What follows it is a deduction: the finetune learns when to say Wait, not how to speak. When backtracking had
sentences of its own, 46 of the 49 sentences that a steered model got wrong were those.

But for the opening they have 10 to 12 tokens, so that the full stop before the last one, where the next word may be
Wait, lies in the paper's window of -13 to -8, as it does in texts whose sentences are of all lengths.
"""

KEYWORDS: Mapping[str, float] = {"Wait": 0.65, "Hmm": 0.35}

LABEL_PROBABILITIES: Mapping[str, float] = {
    "deduction": 0.54,
    "adding-knowledge": 0.17,
    "example-testing": 0.15,
    "uncertainty-estimation": 0.14,
}
"""Of a sentence that neither opens the reply (`initializing`) nor backtracks."""

_TOKEN = re.compile(r"\{\w+\}|\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Process:
    """The hidden process behind the sentences of a reply.

    Attributes:
      start_shaky: probability that the first sentence is shaky.
      to_shaky: probability that a sentence after a sure one is shaky.
      to_sure: probability that a sentence after a shaky one is sure.
      patience: shaky sentences in a row after which the process may backtrack.
      backtrack: probability of backtracking at a boundary after that many.
      false_alarm: probability of backtracking at any other boundary.
    """

    start_shaky: float = 0.2
    to_shaky: float = 0.11
    to_sure: float = 0.10
    patience: int = 2
    backtrack: float = 0.0
    false_alarm: float = 0.0

    @property
    def n_states(self) -> int:
        """States of the hidden chain: sure, and 1 to `patience` (or more) shaky sentences in a row."""
        return 1 + self.patience

    def backtracks(self, state: int) -> float:
        """Probability that the sentence after one in `state` backtracks."""
        return self.backtrack if state == self.patience else self.false_alarm

    def moves(self, state: int) -> dict[int, float]:
        """Probabilities of the next state where the next sentence does not backtrack."""
        if state == 0:
            return {0: 1 - self.to_shaky, 1: self.to_shaky}
        return {0: self.to_sure, min(state + 1, self.patience): 1 - self.to_sure}


BASE = Process()
REASONING = Process(backtrack=0.7, false_alarm=0.004)


@dataclasses.dataclass(frozen=True)
class Template:
    """A kind of sentence.

    Attributes:
      label: of the sentence.
      weight: probability among the sentences that may stand in its place (openings, others, backtracking).
      elements: a word or mark as it stands, a slot `{name}` or a content word `{name}`, one per token.
    """

    label: str
    weight: float
    elements: tuple[str, ...]

    def likelihood(self, position: int, word: str) -> tuple[float, float]:
        """Probability of a word at a position of the sentence, in the sure and in the shaky register.

        A content word counts as certain: which one it is does not depend on register or template.
        """
        return _likelihood(self.elements[position], word) if position < len(self.elements) else (0.0, 0.0)


def _likelihood(element: str, word: str) -> tuple[float, float]:
    name = element.strip("{}")
    if name == element:
        return (1.0, 1.0) if word == element else (0.0, 0.0)
    if name in CONTENT:
        return (1.0, 1.0) if word in CONTENT[name] else (0.0, 0.0)
    if word not in SLOTS[name]:
        return (0.0, 0.0)
    place = SLOTS[name].index(word)
    return SLOT_PROBABILITIES[place], SLOT_PROBABILITIES[-1 - place]


def _templates(label: str, probability: float) -> list[Template]:
    texts = TEMPLATES[label]
    keywords = KEYWORDS if label == "backtracking" else {"": 1.0}
    return [
        Template(label, probability * p / len(texts), tuple(_TOKEN.findall(text.replace("{keyword}", keyword))))
        for text in texts
        for keyword, p in keywords.items()
    ]


OPENINGS = tuple(_templates("initializing", 1.0))
"""What the first sentence may be."""

CONTINUATIONS = tuple(itertools.chain(*(_templates(label, p) for label, p in LABEL_PROBABILITIES.items())))
"""What any later sentence may be that does not backtrack."""

BACKTRACKS = tuple(_templates("backtracking", 1.0))
"""What a sentence that backtracks may be; its slots are drawn in the sure register."""

ALL_TEMPLATES = (*OPENINGS, *CONTINUATIONS, *BACKTRACKS)


def split_tokens(text: str) -> list[str]:
    """Words and punctuation marks of a text, in order; white space is left out."""
    return _TOKEN.findall(text)


def join_tokens(tokens: Sequence[str]) -> str:
    """A sentence from its words and marks: a space before every word but the first."""
    return "".join(" " + token if i and token[0].isalnum() else token for i, token in enumerate(tokens))


def label_of(sentence: str) -> str | None:
    """Label of a sentence of this language; None for anything that differs in the slightest."""
    words = len(split_tokens(sentence))
    return next((template.label for template in _beginning_with(sentence) if len(template.elements) == words), None)


def may_go_on(beginning: str) -> bool:
    """Whether a sentence of this language begins like this."""
    return next(_beginning_with(beginning), None) is not None


def _beginning_with(text: str) -> Iterator[Template]:
    tokens = split_tokens(text)
    if join_tokens(tokens) != text.strip():
        return
    for template in ALL_TEMPLATES:
        if all(template.likelihood(i, token)[0] > 0 for i, token in enumerate(tokens)):
            yield template
