"""How a model reads texts: a tokenizer, a prompt format, and what stands in the place of markers.

Both models of an experiment share a tokenizer; a model of another family reads the *same text* through its own. What is
meant by characters, sections and the ends of words, is then found again among its own tokens.
"""

import dataclasses
import functools
from collections.abc import Collection, Sequence

import numpy as np

from backtrack_jax.config import ModelSpec
from backtrack_jax.data import records
from backtrack_jax.extract import TokenTrace
from backtrack_jax.models import checkpoint, prompts
from backtrack_jax.models.tokenizer import Tokenizer

SHUFFLED = "shuffled"
"""Label of the sections that the control of this name takes as D+."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """What one model makes of a text.

    Attributes:
      tokenizer: of the model.
      prompt: how problems are put to it.
      markers: what it reads in place of markers, see `ModelSpec`.
      marker_replacement: text of the token for `replace`, else empty.
    """

    tokenizer: Tokenizer
    prompt: prompts.PromptFormat
    markers: str = "keep"
    marker_replacement: str = ""

    @classmethod
    def load(cls, model: ModelSpec, prompt: prompts.PromptFormat, tokenizer: str = "") -> "Reader":
        """The reader of a model by its spec; its tokenizer is checked, and is that of the model's path unless given.

        Raises:
          FileNotFoundError, ValueError: there is no tokenizer, it is not handled, or lacks what the prompt asks for.
        """
        revision = None if tokenizer else model.revision or None
        found = Tokenizer.load(checkpoint.resolve(tokenizer or model.path, revision, weights=False))
        prompts.check_tokenizer(found)
        made = cls(found, prompt, model.markers, model.marker_replacement)
        made.prompt_ids("Add one and two.")  # what the prompt and the markers need is there
        return made

    def for_model(self, ids: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Ids as the model reads them, and where each old position went (-1: dropped)."""
        if self.markers == "keep":
            return list(ids), np.arange(len(ids))
        return prompts.map_markers(ids, self._marker_ids, self.markers, self._replacement)

    @functools.cached_property
    def _marker_ids(self) -> tuple[int, ...]:
        return prompts.marker_ids(self.tokenizer)

    @functools.cached_property
    def _replacement(self) -> int | None:
        """Id of the token that the model reads in place of markers; None if it reads none."""
        text = self.marker_replacement
        return prompts.replacement_id(self.tokenizer, text) if text else None

    @property
    def not_read(self) -> tuple[int, ...]:
        """Ids that the model is never shown, in whose place it reads something else or nothing."""
        return () if self.markers == "keep" else self._marker_ids

    def prompt_ids(self, problem: str) -> list[int]:
        """The prompt that the model is given for a problem, token ids with BOS."""
        return self.for_model(prompts.prompt_ids(self.tokenizer, problem, self.prompt))[0]

    def token_trace(
        self, trace: records.Trace, annotation: records.Annotation, drawn: Collection[int] = ()
    ) -> TokenTrace:
        """A trace as the model reads it, with each section's first token.

        Args:
          trace: the trace; its `token_ids`, where it has them, are ids of this tokenizer.
          annotation: its sections.
          drawn: numbers of the sections that have the label `SHUFFLED` as well.

        Raises:
          ValueError: names the trace that cannot be encoded, and why.
        """
        encoded, ids, index, reply_start = self._encode(trace)
        places = [_first_token(trace.text, encoded, index, section) for section in annotation.sections]
        placed = [(section.label, at) for section, at in zip(annotation.sections, places, strict=True)]
        placed += [(SHUFFLED, places[number]) for number in sorted(drawn)]
        starts = [(label, at) for label, at in placed if at is not None]
        return TokenTrace(trace.id, ids, reply_start, starts)

    def token_ends(self, trace: records.Trace, ends: Sequence[int]) -> tuple[TokenTrace, np.ndarray]:
        """A trace as the model reads it, and the tokens with which it has read the text up to some characters.

        Args:
          trace: the trace; `token_ids` as in `token_trace`.
          ends: for each place, the number of characters of the text in front of it.

        Returns:
          The trace without sections, and [n] int64 positions among its ids of the tokens that end exactly there; -1
          where a token holds characters on both sides, the model is not shown the token, or the text was cut before.

        Raises:
          ValueError: as `token_trace`.
        """
        encoded, ids, index, reply_start = self._encode(trace)
        stops = {stop: token for token, (start, stop) in enumerate(encoded.spans, encoded.reply_start) if stop > start}
        # Tokens that hold parts of one character have the same span: the last one, which `stops` keeps, completes it.
        positions = [int(index[stops[end]]) if end in stops else -1 for end in ends]
        return TokenTrace(trace.id, ids, reply_start, ()), np.array(positions, np.int64)

    def encoded(self, trace: records.Trace) -> prompts.EncodedTrace:
        """A trace as token ids, before markers are changed; ValueError names one that cannot be encoded."""
        try:
            return prompts.encode_trace(
                self.tokenizer,
                trace.problem,
                trace.text,
                self.prompt,
                token_ids=trace.token_ids,
                end_marks=trace.end_marks,
            )
        except ValueError as error:
            raise ValueError(f"trace {trace.id!r}: {error}") from error

    def _encode(self, trace: records.Trace) -> tuple[prompts.EncodedTrace, list[int], np.ndarray, int]:
        """The trace, its ids as the model reads them, where each position went, and the reply's first one."""
        encoded = self.encoded(trace)
        ids, index = self.for_model(encoded.ids)
        return encoded, ids, index, int(np.sum(index[: encoded.reply_start] >= 0))


def _first_token(text: str, encoded: prompts.EncodedTrace, index: np.ndarray, section: records.Section) -> int | None:
    """Position of a section's first token among those that a model reads; None if it reads none of the section.

    A section may start with a marker that this model is not shown; it then starts with what follows the marker.
    """
    at = encoded.position_of_char(section.start)
    if at is None:
        return None
    for token, (start, stop) in enumerate(encoded.spans[at - encoded.reply_start :], at):
        if start >= section.stop:
            break
        if index[token] >= 0 and text[start:stop].strip():
            return int(index[token])
    return None
