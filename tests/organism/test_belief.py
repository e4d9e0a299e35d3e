import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from backtrack_jax.organism import corpus, grammar
from backtrack_jax.organism.belief import log_odds
from backtrack_jax.organism.grammar import BASE, CONTENT, REASONING, SLOT_PROBABILITIES, SLOTS, Process


def enumerated(tokens: Sequence[str], process: Process) -> list[float]:
    """Log-odds by summing over every path of labels, templates, registers and counts, written from the definition."""
    return [_posterior(tokens[: t + 1], process) for t in range(len(tokens))]


def _posterior(prefix: Sequence[str], process: Process) -> float:
    mass = {0: 0.0, 1: 0.0}

    def extend(rest: Sequence[str], number: int, register: int, run: int, p: float) -> None:
        """One sentence after another; `run` counts shaky sentences in a row."""
        for label, back, new_register, chance in _choices(number, register, run, process):
            texts = grammar.TEMPLATES[label]
            for text, (keyword, q) in itertools.product(texts, grammar.KEYWORDS.items() if back else [("", 1.0)]):
                elements = text.replace("{keyword}", keyword).replace(",", " ,").replace(".", " .")
                elements = elements.replace(":", " :").replace(";", " ;").split()
                seen = rest[: len(elements)]
                likelihood = math.prod(_word(e, w, new_register) for e, w in zip(elements, seen, strict=False))
                joint = p * chance * q / len(texts) * likelihood
                if not joint:
                    continue
                if len(rest) <= len(elements):
                    mass[new_register] += joint
                else:
                    extend(rest[len(elements) :], number + 1, new_register, run + 1 if new_register else 0, joint)

    extend(prefix, 0, 0, 0, 1.0)
    return math.log(mass[1] / mass[0]) if mass[1] else -math.inf


def _choices(number: int, register: int, run: int, process: Process) -> list[tuple[str, bool, int, float]]:
    """(label, backtracks, register, probability) of the next sentence."""
    if number == 0:
        return [("initializing", False, z, (1 - process.start_shaky, process.start_shaky)[z]) for z in (0, 1)]
    back = process.backtrack if run >= 2 else process.false_alarm
    shaky = 1 - process.to_sure if register else process.to_shaky
    going_on = [
        (label, False, z, (1 - back) * (1 - shaky, shaky)[z] * p)
        for label, p in grammar.LABEL_PROBABILITIES.items()
        for z in (0, 1)
    ]
    return [*going_on, ("backtracking", True, 0, back)]


def _word(element: str, word: str, register: int) -> float:
    name = element.strip("{}")
    if name == element:
        return float(word == element)
    if name in CONTENT:
        # Any number will do: the same for all templates and registers.
        return 0.5 * (word in CONTENT[name])
    probabilities = SLOT_PROBABILITIES[::-1] if register else SLOT_PROBABILITIES
    return probabilities[SLOTS[name].index(word)] if word in SLOTS[name] else 0.0


@pytest.mark.parametrize("process", [BASE, REASONING], ids=["base", "reasoning"])
@pytest.mark.parametrize("seed", range(4))
def test_filter_equals_enumeration_of_all_hidden_paths(process: Process, seed: int) -> None:
    written = (d for d in corpus.documents(REASONING, seed) if d.problem)
    wanted = (d for d in written if process is BASE or any(s.label == "backtracking" for s in d.sentences[:4]))
    sentences = next(wanted).sentences[:4]
    tokens = grammar.split_tokens(" ".join(sentence.text for sentence in sentences))
    if process is BASE and any(s.label == "backtracking" for s in sentences):
        tokens = tokens[: tokens.index(grammar.split_tokens(sentences[0].text)[0]) + 12]
    np.testing.assert_allclose(log_odds(tokens, process), enumerated(tokens, process), rtol=1e-9, atol=1e-9)


def test_belief_is_calibrated() -> None:
    """Of all tokens at which the filter says p, a share p stands in a shaky sentence."""
    predicted, true = [], []
    for document in itertools.islice(corpus.documents(REASONING, 9), 1600):
        for sentence in document.sentences:
            true += [sentence.register] * len(grammar.split_tokens(sentence.text))
        predicted.append(log_odds(grammar.split_tokens(document.reply.partition("\n")[0]), REASONING))
    p = 1 / (1 + np.exp(-np.concatenate(predicted)))
    shaky = np.array(true, float)
    assert len(p) == len(shaky)
    for low in np.arange(0, 1, 0.2):
        chosen = (p >= low) & (p < low + 0.2)
        assert abs(p[chosen].mean() - shaky[chosen].mean()) < 0.04


def test_nothing_is_believed_after_text_that_the_process_cannot_write() -> None:
    tokens = grammar.split_tokens("Okay, we need a firm rule for the map, so I must look inside the story. Wait, no.")
    for process, last in ((BASE, tokens.index("Wait")), (REASONING, len(tokens) - 2)):
        known = np.isfinite(log_odds(tokens, process)) | np.isneginf(log_odds(tokens, process))
        assert known[:last].all() and not known[last:].any()
