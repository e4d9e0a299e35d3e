"""Texts by which models mark turns, thinking and ends. Imports nothing of the package: configs and records need it too.

A mark is a token in some vocabularies and ordinary text in others (OLMo 3 writes `<think>` in three tokens), so that
everything goes by text, and ids are looked up in a tokenizer.
"""

import re

START_OF_THOUGHT = ("<think>", "<thinking>", "[THINK]", "<|begin_of_thought|>")
"""Texts that open the reasoning: R1, Qwen3, SmolLM3 and OLMo 3; others by their own."""

END_OF_THOUGHT = ("</think>", "</thinking>", "[/THINK]", "<|end_of_thought|>")
"""Texts that end the reasoning, in the same order; an answer may follow."""

_END_OF_REPLY = ("<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|eot_id|>", "<|endoftext|>", "<|im_end|>")

END_MARKERS = (*END_OF_THOUGHT, *_END_OF_REPLY)
"""Texts that end the reasoning or the reply, for tokenizers that have no such token too; no reasoning follows."""

TURNS = (
    *("<｜User｜>", "<｜Assistant｜>"),  # the bars are U+FF5C
    *("<|im_start|>", "<|im_end|>"),  # Qwen, SmolLM, OLMo
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),  # Mistral
)
"""Texts that mark whose turn it is."""

# Something that names thinking and looks like the end of it: </reasoning>, </seed:think>, [/THOUGHT], <|end_of_cot|>.
_NAME = r"[\w:.-]*(?:think|thought|reason|reflect|rationale|scratchpad|cot\b)[\w:.-]*"
_SEEMS_TO_END = re.compile(
    rf"</{_NAME}>|\[/{_NAME}\]|◁/{_NAME}▷|<[|｜](?:/|end[_▁])(?:of[_▁])?{_NAME}[|｜]>", re.IGNORECASE
)


def unknown_end(text: str) -> str:
    """The first text in a reasoning that looks like the end of it and is not known to be; empty if there is none."""
    found = _SEEMS_TO_END.search(text)
    return found[0] if found else ""
