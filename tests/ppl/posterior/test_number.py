r"""The number of a text: every way of writing it, and what is no number."""

import random
import re
from fractions import Fraction

import pytest

import ponder

WRITTEN = [
    # Thousands, decimals, signs, currencies.
    ("1000", "1000"),
    ("1,000", "1000"),
    ("1000.0", "1000"),
    ("1,000.00", "1000"),
    ("$1,000", "1000"),
    ("It costs $1,000.", "1000"),
    ("1,234,567.50", "1234567.5"),
    ("1,00,000", "100000"),
    ("1\u202f000\u202f000", "1000000"),
    ("007", "7"),
    (".5", "0.5"),
    ("$.50", "0.5"),
    ("3.140", "3.14"),
    ("so 18.", "18"),
    ("18!", "18"),
    ("-5", "-5"),
    ("is -5", "-5"),
    ("= - 5", "-5"),
    ("\u22125", "-5"),
    ("+5", "5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("€ 12.30", "12.3"),
    ("12 €", "12"),
    ("-0", "0"),
    ("(-3)", "-3"),
    # Differences, hyphens and lists have no sign.
    ("10-5", "5"),
    ("10 - 5", "5"),
    ("10 -5", "5"),
    ("(x)-5", "5"),
    ("COVID-19", "19"),
    ("Apples:\n- 5", "5"),
    ("1990-2000", "2000"),
    # Fractions, mixed numbers, powers, words.
    ("3/4", "0.75"),
    ("1/3", "1/3"),
    ("2/6", "1/3"),
    ("-2 / 6", "-1/3"),
    ("1 1/2", "1.5"),
    ("-1 1/2", "-1.5"),
    ("1½", "1.5"),
    ("⅔", "2/3"),
    ("1,000/3", "1000/3"),
    ("6/3", "2"),
    ("1.5e3", "1500"),
    ("1.5E-3", "0.0015"),
    ("1.5 \u00d7 10^3", "1500"),
    ("2 * 10**6", "2000000"),
    ("2^10", "1024"),
    ("1.5 million dollars", "1500000"),
    ("2 hundred", "200"),
    ("50%", "50"),
    ("12.5 %", "12.5"),
    ("5kg and 6th", "6"),
    ("12/25/2024", "2024"),
    ("1,2,3", "3"),
    ("1, 234", "234"),
    ("1,2345", "2345"),
    ("version 1.2.3", "1.2"),
    # LaTeX.
    (r"\frac{1}{3}", "1/3"),
    (r"-\frac{1}{3}", "-1/3"),
    (r"x = -\frac{1}{3}", "-1/3"),
    (r"\frac{-1}{3}", "-1/3"),
    (r"\dfrac12", "0.5"),
    (r"1\frac{1}{2}", "1.5"),
    (r"\$1{,}000", "1000"),
    (r"1\,000", "1000"),
    (r"1,\!000", "1000"),
    (r"25\%", "25"),
    (r"3\times10^{4}", "30000"),
    (r"2\times5 = 10", "10"),
    (r"90^\circ", "90"),
    # Nothing.
    ("", None),
    ("Paris", None),
    ("x^2", None),
    ("a_{1}", None),
    ("H2O", None),
    ("5/0", None),
    ("1e999999999", None),
    ("9" * 401, None),
    ("²", None),
    ("-", None),
    (".", None),
]


SEVERAL = {
    "10-5",
    "10 - 5",
    "10 -5",
    "Apples:\n- 5",
    "1990-2000",
    "5kg and 6th",
    "12/25/2024",
    "1,2,3",
    "1, 234",
    "1,2345",
}
"""Texts with several numbers, of which the last one counts, but not after "the answer is"."""


@pytest.mark.parametrize(("text", "number"), WRITTEN)
def test_ways_of_writing_a_number(text, number):
    assert ponder.extract_number(text) == number
    if number is not None and text not in SEVERAL:
        assert ponder.extract_number(f"First 17, then 3 + 4 = 7.\nThe answer is: {text}") == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"It is 3, so \boxed{4}, which is not 5.", "4"),
        ("**Answer**: 42 (since 3 + 39)", "42"),
        (r"\boxed{x=5\text{ or }x=6}", None),
        (r"\boxed{x = 3 + 2 = 5}", "5"),
        (r"\boxed{3} no, \boxed{\frac{8}{2}}", "4"),
        (r"\boxed{\text{18 dollars}}", "18"),
        (r"\boxed{18\text{ dollars}}", "18"),
        (r"\boxed{18\text{ m}^2}", "18"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{- 5}", "-5"),
        (r"\boxed{-\frac{1}{2}}", "-0.5"),
        (r"\boxed{\$1{,}250.00}", "1250"),
        (r"\boxed{(7)}", "7"),
        (r"\boxed{45^\circ}", "45"),
        (r"\boxed{4", "4"),  # cut off: the last number
        (r"5 and \boxed{2\sqrt{3}}", None),
        (r"5 and \boxed{5\pi}", None),
        (r"5 and \boxed{(3, 4)}", None),
        (r"5 and \boxed{2x}", None),
        (r"5 and \boxed{x + 5}", None),
        (r"5 and \boxed{\text{Paris}}", None),
        (r"5 and \boxed{}", None),
        ("2 + 3 = 5\n#### 5\n", "5"),
        ("#### -1,200", "-1200"),
        ("####$18", "18"),
        ("#### Step 3\nso 12", "12"),  # a heading
        ("The answer is 18. There were 3 boxes.", "18"),
        ("The answer is 3 + 4 = 7 apples, 2 more.", "7"),
        ("**Final Answer:** 12\n\nI used 3 steps.", "12"),
        ("The final answer is:\n\n42\n\n7", "42"),
        ("Answer: $x = 9$. Check: 3.", "9"),
        ("The answer is 1. No, the answer is 2. (3)", "2"),
        ("There are 12, and that answer is clear.", "12"),
        ("Answer: Tom has 3 boxes of 4 pens. 3 * 4 = 12. 12 - 2 = 10.", "10"),  # a solution begins
        ("The answer is that of 12 pens 10 are left. I used 2 steps.", "10"),
        ("The answer is about 3.5, or 4.", "3.5"),
        ("The answer is:\n\\[\n42\n\\]\nQ: 7", "42"),
        ("The answer is x = 2 * 4 = 8. (1)", "8"),
        ("4 boxes, 3 pens: 4 * 3 - 2 = 10 pens", "10"),
        ("<<4*3=12>>12", "12"),
    ],
)
def test_where_the_answer_stands(text, number):
    assert ponder.extract_number(text) == number


@pytest.mark.parametrize(("text", "number"), [("10**2", "100"), ("costs 10 **5**", "5")])
def test_stars(text, number):
    assert ponder.extract_number(text) == number


def test_what_was_misread():
    """`\\d+` reads the last three digits of a thousand."""
    assert re.findall(r"\d+", "It costs $1,000")[-1] == "000"
    assert ponder.extract_number("It costs $1,000") == "1000"


def test_one_spelling_a_value():
    """Random values in random spellings come back as they were; the spelling is the value's alone."""
    rng = random.Random(0)
    for _ in range(200):
        value = Fraction(rng.randrange(-(10**7), 10**7), rng.choice([1, 1, 2, 3, 4, 7, 8, 10, 100, 125, 12]))
        ways = [
            f"{value.numerator}/{value.denominator}",
            rf"\frac{{{value.numerator}}}{{{value.denominator}}}",
        ]
        if value.denominator == 1:
            ways += [f"{value.numerator:,}", f"${value.numerator:,}.00", f"{value.numerator}.0"]
        elif 1000 % value.denominator == 0:
            ways += [f"{float(value):.3f}", f"{float(value):,.4f}"]
        found = {ponder.extract_number(f"so it is {way}.") for way in ways}
        assert len(found) == 1
        assert Fraction(found.pop()) == value


def test_long_texts_take_linear_time():
    """Milliseconds here; what goes back over the text for every number or brace would take minutes."""
    size = 10_000
    pieces = ("1,", "-", "1 1/", "1,000 ", "\\boxed{", "\\frac{", "\\text{", "answer is ", "answer: - ", " ")
    for piece in pieces:
        ponder.extract_number(piece * size + "1")


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"text: expected a str, got 5 \(int\)"):
        ponder.extract_number(5)
