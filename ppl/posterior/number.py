r"""The number that a text gives as its answer, in one spelling: what `Posterior.answers` needs most often.

A number is read exactly, as a fraction, wherever it stands. Where to look for it is a matter of four habits
of writing answers: a box, "####", "the answer is", the last number. That is all that this module knows of
mathematics; equality of expressions is for a computer algebra system.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

__all__ = ["extract_number"]

_MAX_DIGITS = 400
"""Numbers with more digits, or with a larger power of ten, are no answers: they are skipped."""

_WORDS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CURRENCY = "[$€£¥₹]"
_COMMA = "[,\u00a0\u2009\u202f]"
# 1,000,000 or 1,00,000 (also with narrow blanks), else plain digits.
_GROUPED = (
    rf"(?<![0-9],)(?:[0-9]{{1,3}}(?:{_COMMA}[0-9]{{3}})+|[0-9]{{1,2}}(?:,[0-9]{{2}})+,[0-9]{{3}})(?!,?[0-9])"
)
_WHOLE = rf"(?:{_GROUPED}|[0-9]+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    # Not inside a word, a number, an exponent or an index.
    rf"(?<![\w^])(?<![0-9]\.)(?<![\^_]\{{)(?P<first>{_DECIMAL})(?:"
    r"\ (?P<part>[0-9]+\ ?/\ ?[0-9]+)(?![0-9]|\ ?/)"  # 1 1/2
    rf"|\ ?/\ ?(?P<below>{_DECIMAL})(?!\ ?/\ ?[0-9])"  # 3/4; not the date 3/4/25
    r"|[eE](?P<power>[-+]?[0-9]+)"
    r"|\ ?(?:[\u00d7*]|\\times|\\cdot)\ ?10\ ?(?:\^|\*\*)\ ?\{?(?P<ten>[-+]?[0-9]+)\}?"
    r"|(?:\ ?\^\ ?|\*\*(?=[0-9]))\{?(?P<raised>[0-9]+)\}?"
    rf")?(?:[\ -](?P<word>{'|'.join(_WORDS)})\b)?",
    re.IGNORECASE,
)
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")  # a box, an escaped brace, a brace
_ANSWER = re.compile(r"\banswer[*_]*(?:(?P<verb>\s+is|\s+equals)|\s*[:=])[\s:=*]*", re.IGNORECASE)
# What may stand between that and a number; the name of an unknown, too.
_BEFORE = re.compile(
    rf"(?:[\s*_\\\[\](){{}}:=~+-]|{_CURRENCY}|about|approximately|[a-z]\s*=)*[0-9.]", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
_EQUALS = re.compile(r"=|≈|\\approx|\\equiv")
# What may stand beside the number of a box: words and punctuation, but no variables, operators or commands.
_BESIDE = re.compile(rf"(?:[^\W\d_]{{2,}}|{_CURRENCY}|[\s%.,:;()\[\]{{}}*°/-])*")

_VULGAR = dict(
    zip(
        "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞",
        "1/2 1/3 2/3 1/4 3/4 1/5 2/5 3/5 4/5 1/6 5/6 1/8 3/8 5/8 7/8".split(),
        strict=True,
    )
)
_FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{\s*(-?[0-9.,]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9.,]+)\s*\}|([0-9]))"
    rf"|([{''.join(_VULGAR)}])"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_UNIT = re.compile(_TEXT.pattern + r"(?:\s*\^\s*\{?[0-9]\}?)?")
_LATEX = (
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"(?<=[0-9])\\[,!](?=[0-9]{3})"), ","),  # 1\,000
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!"), ""),
    (re.compile(r"\\[,;: ]|~"), " "),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])"), "°"),
    (re.compile(r"\\(?=[$%#&])"), ""),
    (re.compile(r"(\\[a-zA-Z]+)(?=[0-9])"), r"\1 "),  # \times5
    (re.compile("[\u2212\u2012]"), "-"),
)


class _Found(NamedTuple):
    """A number and where it stands, without its sign."""

    value: Fraction
    start: int
    end: int


def extract_number(text: str) -> str | None:
    r"""Return the number that a text gives as its answer, in one spelling; None if it gives none.

    Looked for, in this order: the last `\boxed{...}`; a number behind the last "####"; one behind the last
    "the answer is", "answer:" or "answer =" (the one after the last "=" of that sentence, or else the first);
    the last number of the text. A box that holds something else than one number, such as a root, a pair or a
    word, has no number, and what stands outside it does not count.

    It reads thousands separators (1,000; 1{,}000; 1,00,000), decimals, signs (also −), currencies ($, €, £,
    ¥, ₹), fractions (3/4; \frac{3}{4}; ¾), mixed numbers (1 1/2), powers (1.5e3; 1.5 × 10^3; 2^10) and the
    words from hundred to trillion. A percent sign is left out, as in the answers of GSM8K and MATH: "50%" is
    50. Notation is English: "3,5" is two numbers.

    Equal numbers are spelt the same, so that `posterior.answers(ponder.extract_number)` takes them together:
    as an integer or a decimal where there is one, else as a reduced fraction. `fractions.Fraction` reads all.

    Args:
        text: of a trace.

    Raises:
        TypeError: `text` is no str.

    Examples:
        >>> [extract_number(text) for text in ("It costs $1,000.", "1000.0", r"\boxed{\frac{2}{6}}", "Paris")]
        ['1000', '1000', '1/3', None]
    """
    if not isinstance(text, str):
        raise TypeError(f"text: expected a str, got {text!r} ({type(text).__name__})")
    box = _last_box(text)
    if box is not None:
        return _spell(_only_number(box))
    text = _plain(text)
    _, marker, after = text.rpartition("####")
    stated = re.match(rf"[\s:*]*-?\s*{_CURRENCY}?\s*-?(?=[0-9.])", after) if marker else None
    if stated and (number := next(_numbers(re.sub(r"^([\s:*]*)-\s+", r"\1-", after)), None)):
        return _spell(number.value)
    phrases = list(_ANSWER.finditer(text))
    if phrases and (number := _stated(phrases[-1])):
        return _spell(number.value)
    numbers = list(_numbers(text))
    return _spell(numbers[-1].value) if numbers else None


def _last_box(text: str) -> str | None:
    """What the last box holds; None without a box that is closed."""
    opened: list[tuple[bool, int]] = []
    last = (-1, -1)
    for brace in _BRACE.finditer(text):
        if brace[0] == "}":
            is_box, start = opened.pop() if opened else (False, 0)
            if is_box:
                last = max(last, (start, brace.start()))
        elif brace[0].endswith("{") and len(brace[0]) != 2:
            opened.append((len(brace[0]) > 1, brace.end()))
    return None if last[0] < 0 else text[slice(*last)]


def _only_number(box: str) -> Fraction | None:
    """The number of a box that holds one and nothing but words beside it."""
    bare = _UNIT.sub(" ", box)
    several = re.search(r"\b(?:or|and)\b", box)
    box = _plain(bare if re.search("[0-9½-⅞¼-¾]", bare) else box)
    if several and len({number.value for number in _numbers(box)}) > 1:
        return None  # x = 5 or x = 6
    box = re.sub(r"^\s*-\s+", "-", _EQUALS.split(box)[-1])
    numbers = list(_numbers(box))
    if len(numbers) != 1:
        return None
    beside = box[: numbers[0].start] + " " + box[numbers[0].end :]
    attached = re.match(r"[a-zA-Z](?![a-zA-Z])", box[numbers[0].end :])  # 2x
    return numbers[0].value if _BESIDE.fullmatch(beside) and not attached else None


def _stated(phrase: re.Match[str]) -> _Found | None:
    """The number that is stated behind "answer is" or "answer:"; None where the words go on without one."""
    text = re.sub(r"^-\s+", "-", phrase.string[phrase.end() :])
    end = _SENTENCE_END.search(text)
    sentence = text[: end.start()] if end else text
    numbers = list(_numbers(sentence))
    result = next(_numbers(_EQUALS.split(sentence)[-1]), None)
    if _BEFORE.match(text):
        return result or (numbers[0] if numbers else next(_numbers(text), None))
    # "Answer: Tom has 3 boxes." begins a solution, "the answer is that 12 are left" ends one.
    return (numbers[-1] if numbers else None) if phrase["verb"] else None


def _plain(text: str) -> str:
    """Write LaTeX's and other spellings of numbers as plain ones."""
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)

    def fraction(match: re.Match[str]) -> str:
        above, above_digit, below, below_digit, vulgar = match.groups()
        plain = _VULGAR[vulgar] if vulgar else f"{above or above_digit}/{below or below_digit}"
        mixed = match.string[max(match.start() - 1, 0) : match.start()].isdigit()
        return f" {plain}" if mixed else plain

    return _FRACTION.sub(fraction, _TEXT.sub(r" \1 ", text))


def _numbers(text: str) -> Iterator[_Found]:
    """The numbers of a text in their order."""
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None:
            start = match.start()
            yield _Found(
                -value if _is_negative(text[max(start - 80, 0) : start]) else value, start, match.end()
            )


def _value(match: re.Match[str]) -> Fraction | None:
    """The number without its sign; None where it is too large, or divided by zero."""
    power = int((match["power"] or match["ten"] or "0")[:9])
    raised = int((match["raised"] or "1")[:9])
    if max(len(match[0]), abs(power), len(match["first"]) * raised) > _MAX_DIGITS:
        return None
    try:
        value = Fraction(re.sub(_COMMA, "", match["first"])) * Fraction(10) ** power
        value **= raised
        if match["part"]:
            value += Fraction(match["part"].replace(" ", ""))
        if match["below"]:
            value /= Fraction(re.sub(_COMMA, "", match["below"]))
    except ZeroDivisionError:
        return None
    return value * _WORDS[match["word"].lower()] if match["word"] else value


def _is_negative(before: str) -> bool:
    """Tell from what stands before a number whether it has a minus sign, and not a hyphen or a difference."""
    spaced = before.endswith("- ")
    before = re.sub(rf"{_CURRENCY}?\ ?$", "", before)
    if not before.endswith("-"):
        return False
    before = before[:-1]
    line = before.rpartition("\n")[2].rstrip(" ")
    if before[-1:].isalnum() or before[-1:] in {")", "]", "}", "%", "-"}:
        return False
    if line[-1:].isdigit() or line[-1:] in {")", "]", "}", "%"}:  # 10 -5
        return False
    return not spaced or line[-1:] in {"=", ":", "(", "{", "[", "$", "≈"}  # else an item of a list


def _spell(value: Fraction | None) -> str | None:
    """One spelling for each value: an integer, a decimal that ends, or a reduced fraction."""
    if value is None:
        return None
    rest, places = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        places = max(places, count)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    whole, part = digits[: len(digits) - places], digits[len(digits) - places :]
    return ("-" if value < 0 else "") + whole + ("." + part if part else "")
