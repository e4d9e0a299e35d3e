"""Answers in replies: what is read off them, and what counts as the same."""

from fractions import Fraction

import pytest

from backtrack_jax.data import answers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-7", -7),
        ("−7", -7),
        ("3.50", Fraction(7, 2)),
        (".5", Fraction(1, 2)),
        ("1,250,000", 1250000),
        ("$1,250", 1250),
        ("50%", 50),
        ("50\\%", 50),
        ("3/4", Fraction(3, 4)),
        ("6 / 8", Fraction(3, 4)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("-\\dfrac{3}{4}", Fraction(-3, 4)),
        ("12 km", 12),
        ("12 cm^2", 12),
        ("12\\text{ litres}", 12),
        ("12.", 12),
        ("yes", None),
        ("3/0", None),
        ("x = 4", None),
        ("2^10", None),
        ("12 of 20", None),
        ("", None),
    ],
)
def test_what_a_number_is(text: str, value: Fraction | int | None) -> None:
    assert answers.number(text) == value


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("So we get \\boxed{12}.", "12", True),
        ("First \\boxed{11}, no: \\boxed{ 12 }.", "12", True),
        ("\\boxed{\\frac{1}{2}}", "1/2", True),
        ("\\boxed{0.5}", "1/2", True),
        ("\\boxed{\\text{Ada}}", "Ada", True),
        ("\\boxed{12", "12", True),  # never closes: the last number
        ("The answer is 12. I used 3 steps.", "12", True),
        ("The answer is 12.5 litres.", "12", False),
        ("Answer: **12**", "12", True),
        ("The final answer to the problem is: 1,200.", "1200", True),
        ("The answer is 11. Wait, that is wrong. The answer is 12.", "12", True),
        ("2 + 3 = 5, and 5 + 7 = 12", "12", True),
        ("There are 12, not 13", "12", False),  # the last number is another one
        ("I cannot tell.", "12", False),
        ("The answer is yes.", "yes", True),
        ("The answer is no.", "yes", False),
        ("Answer: cannot be told", "cannot be told", True),
        ("The answer is: the red box", "red", False),
        ("The answer is red.", "red", True),
        ("So it must be in the red box.", "red", True),
        ("Ada is behind Ben. So Ben is first.", "Ben", True),
        ("So Ben is first. Ada is next", "Ben", False),
        ("The answer is Ada", "ada", True),
        ("", "Ada", False),
        ("\\boxed{3/0}", "3", False),
    ],
)
def test_whether_a_reply_is_right(reply: str, answer: str, right: bool) -> None:
    assert answers.is_right(reply, answer) is right
