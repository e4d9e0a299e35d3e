"""States of two models with which they have read the same text: at the ends of words, by characters.

Tokens of two vocabularies do not begin and end at the same places. At the end of a word (a run of characters without
white space) both models have read the same characters, if a token of each ends exactly there; other ends are left out.
A state at such a place is the residual stream at that token, behind one block.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open

from backtrack_jax.analysis import activations
from backtrack_jax.data.problems import spread
from backtrack_jax.data.records import Trace
from backtrack_jax.data.text import opening_end, reasoning
from backtrack_jax.extract import TokenTrace
from backtrack_jax.files import store
from backtrack_jax.files.console import Progress
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.readers import Reader

_WORD = re.compile(r"\S+")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Places at which two models have read the same text.

    Attributes:
      problems: [n], the problem of each place; places stand in the order of the texts.
      texts: for each of both models, the texts as it reads them.
      positions: for each of both models and each text, the tokens at its places, [places] int64.
    """

    problems: np.ndarray
    texts: tuple[list[TokenTrace], list[TokenTrace]]
    positions: tuple[list[np.ndarray], list[np.ndarray]]


def word_ends(text: str) -> list[int]:
    """For each word of a text, the number of characters up to its end."""
    return [match.end() for match in _WORD.finditer(text)]


def pair(traces: Sequence[Trace], readers: tuple[Reader, Reader], limit: int) -> Pairs:
    """Ends of words of the reasoning, at which a token of both readers ends.

    Args:
      traces: with `token_ids` of the second reader's tokenizer, or without; the first one reads the text.
      readers: of both models.
      limit: number of places, evenly spread over all there are; 0 takes all.

    Raises:
      ValueError: a trace cannot be encoded, or the two tokenizers have no place in common.
    """
    read: list[tuple[TokenTrace, TokenTrace]] = []
    places: list[tuple[int, int, int]] = []  # number of the text, positions
    for number, trace in enumerate(traces):
        begin = opening_end(trace.text)
        ends = [end for end in word_ends(reasoning(trace)) if end > begin]
        of_first, first = readers[0].token_ends(dataclasses.replace(trace, token_ids=None), ends)
        of_second, second = readers[1].token_ends(trace, ends)
        read.append((of_first, of_second))
        both = (first > 0) & (second > 0)  # behind the first token, where states are of another size
        places += [(number, int(a), int(b)) for a, b in zip(first[both], second[both], strict=True)]
    if not places:
        raise ValueError(
            f"{readers[0].tokenizer.name} and {readers[1].tokenizer.name} have no token that ends at the end of the "
            f"same word in any of {len(traces)} texts"
        )
    at: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for number, *both_at in spread(places, limit):
        for own, position in zip(at[number], both_at, strict=True):
            own.append(position)
    numbers = sorted(at)
    problems = [traces[number].problem_id for number in numbers for _ in at[number][0]]
    texts = [[read[number][model] for number in numbers] for model in (0, 1)]
    positions = [[np.array(at[number][model], np.int64) for number in numbers] for model in (0, 1)]
    return Pairs(np.array(problems, str), (texts[0], texts[1]), (positions[0], positions[1]))


def read_states(model: Decoder, title: str, pairs: Pairs, number: int, layer: int, *, batch_size: int) -> np.ndarray:
    """States of one of the two models at the places of the pairs, [n, D] float32 in the order of `Pairs.problems`.

    Args:
      model: the model.
      title: of the progress.
      pairs: the places.
      number: of the model among the two, 0 or 1.
      layer: block behind which they are read, 0-based.
      batch_size: texts per forward pass.

    Raises:
      ValueError: as `activations.read`.
      FloatingPointError: a state is not finite.
    """
    texts, positions = pairs.texts[number], pairs.positions[number]
    found: dict[int, np.ndarray] = {}
    with Progress(title, len(texts), 0) as progress:
        for batch in activations.read(model, texts, positions, [layer], batch_size=batch_size):
            found |= {text: states[:, 0] for text, states in batch}
            progress.update(len(batch), sum(len(texts[text].ids) for text, _ in batch))
    states = np.concatenate([found[text] for text in range(len(texts))])
    if not np.isfinite(states).all():
        raise FloatingPointError(f"states behind block {layer} are not finite")
    return states


def save_states(path: Path, states: Sequence[np.ndarray]) -> None:
    """Writes several sets of states to a file that is whole or absent."""
    store.write_safetensors(path, {str(n): np.ascontiguousarray(of) for n, of in enumerate(states)}, {})


def load_states(path: Path) -> list[np.ndarray]:
    """What `save_states` wrote."""
    with safe_open(path, "np") as file:
        return [file.get_tensor(str(n)) for n in range(len(list(file.keys())))]
