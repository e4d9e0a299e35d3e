"""Whether a reply gives the right answer: numbers and choices, normalised as for MATH (Hendrycks et al., 2021)."""

import re
from fractions import Fraction

_BOXED = re.compile(r"\\boxed\s*\{")
_STATED = re.compile(
    r"(?:final\s+answer|answer|solution|result)(?:\s+to\s+the\s+\w+)?\s*(?:is|are|:|=)+\s*:?\s*", re.IGNORECASE
)
_NUMBER = re.compile(
    r"-?\\d?frac\{\s*-?\d+\s*\}\{\s*\d+\s*\}|-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+\s*/\s*\d+|-?\d*\.\d+|-?\d+"
)
_FRACTION = re.compile(r"(-?)\\d?frac\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}")


def is_right(reply: str, answer: str) -> bool:
    """Whether the answer that a reply gives is the right one.

    Args:
      reply: text of a reply; only what stands behind the end of its reasoning should be given, if it has one.
      answer: a number (`12`, `3/4`, `0.5`) or a choice, a word or a few (`yes`, `Ada`, `cannot be told`).
    """
    given = stated(reply, answer)
    if given is None:
        return False
    right, found = number(answer), number(given)
    if right is not None:
        return found == right
    return _words(given) == _words(answer)


def stated(reply: str, answer: str) -> str | None:
    """The answer that a reply gives, of the kind of `answer`: a number or a choice.

    What stands in the last `\\boxed{}`; else what follows the last "answer is", up to the sentence's end; else the last
    number of the reply or, of a choice, its last sentence where it names that choice alone.

    Returns:
      Its text; None where there is none.
    """
    boxed = _last_boxed(reply)
    if boxed is not None:
        return boxed
    is_number = number(answer) is not None
    told = [found.end() for found in _STATED.finditer(reply)]
    if told:
        rest = re.split(r"(?<=[^\d\s])[.!?](?:\s|$)|(?<=\d)[.!?](?:\s|$)|\n", reply[told[-1] :])[0]
        rest = rest.strip().strip("*_`\"'“” .:$")
        if not is_number:
            return rest or None
        if found := _NUMBER.search(rest):
            return found[0]
    if is_number:
        found = _NUMBER.findall(reply)
        return found[-1] if found else None
    sentences = [text for text in re.split(r"[.!?\n]+", reply) if text.strip()]
    last = _words(sentences[-1]) if sentences else []
    return answer if _contains(last, _words(answer)) else None


def number(text: str) -> Fraction | None:
    """The number that a text is, exactly; None where it is none.

    Signs of money, per cent, thousands and units behind a number do not count: `$1,250 dollars` is 1250, `50%` is 50.
    """
    text = (
        text.strip()
        .lstrip("$€£ ")
        .rstrip("$ .")
        .replace("−", "-")
        .replace("\\%", "%")
        .replace("\\,", "")
        .replace("\\!", "")
    )
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1", text)
    if found := _FRACTION.match(text):
        value = Fraction(int(found[2]), int(found[3])) if int(found[3]) else None
        return -value if value is not None and found[1] else value
    found = _NUMBER.match(text)
    if not found:
        return None
    behind = re.sub(r"(?<=[a-z])\^?\d", "", text[found.end() :])  # of a unit, such as cm^2
    if behind.startswith("^") or re.search(r"\d", behind):
        return None
    parts = found[0].replace(",", "").replace(" ", "").split("/")
    if len(parts) == 2:
        return Fraction(int(parts[0]), int(parts[1])) if int(parts[1]) else None
    return Fraction(parts[0])


def _last_boxed(text: str) -> str | None:
    """What stands in the braces of the last `\\boxed`; None without one that closes."""
    for found in reversed(list(_BOXED.finditer(text))):
        depth, start = 1, found.end()
        for at in range(start, len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if not depth:
                return re.sub(r"\\text\{([^{}]*)\}", r"\1", text[start:at]).strip()
    return None


def _words(text: str) -> list[str]:
    """Words in lower case, without an article at the start."""
    words = re.findall(r"[\w'-]+", text.casefold())
    return words[1:] if words[:1] in (["the"], ["a"], ["an"]) else words


def _contains(words: list[str], sought: list[str]) -> bool:
    n = len(sought)
    return bool(n) and any(words[at : at + n] == sought for at in range(len(words) - n + 1))
