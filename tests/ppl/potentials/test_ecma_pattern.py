"""The patterns of schemas: searched for, in ECMA's sense."""

import re

import pytest

from ponder.potentials.ecma_pattern import full_match, search_pattern

CASES = [
    (r"^\d+$", "12", "\u0661"),  # ASCII digits alone
    (r"^\w$", "_", "é"),
    (r"^\W$", "é", "a"),
    (r"^[\W]$", "é", "a"),
    (r"^[^\d\s]$", "é", "\ufeff"),
    (r"^\s$", "\ufeff", "\x1c"),
    (r"^.$", "é", "\u2028"),
    ("a+", "xaay", "xy"),  # searched for
    ("^a|b$", "xb", "bx"),
    ("^(a|b)$", "b", "bx"),
    ("a$", "ba", "a\n"),
    ("a{,3}", "a{,3}", "aaa"),
    ("^[^]$", "\n", ""),
    ("^[]|a$", "a", ""),
    (r"^\p{L}+$", "éa", "1"),
    (r"^[\P{L}a]$", "1", "é"),
    ("^[a&&b]$", "&", "x"),
    ("^[[]$", "[", "]"),
    (r"^\cA$", "\x01", "A"),
    (r"^\u{1F600}$", "😀", "1F600"),
    (r"^\ud83d\ude00$", "😀", "x"),
    ("^[(?:]$", "?", "x"),
    ("^[{2}]$", "}", "["),
    (r"^[a-\d]$", "-", "b"),
    (r"^[\x00-\x1f]$", "\x05", " "),
    (r"^(?<year>\d{4})$", "1999", "199"),
]


@pytest.mark.parametrize(("pattern", "found", "missed"), CASES)
def test_both_spellings_mean_what_ecma_means(pattern, found, missed):
    search, full = search_pattern(pattern), full_match(pattern, r"[\s\S]*")
    assert full is not None
    for text, expected in ((found, True), (missed, False)):
        assert bool(re.search(search, text)) == expected
        assert bool(re.fullmatch(full, text)) == expected


@pytest.mark.parametrize(
    ("pattern", "found", "missed"),
    [
        (r"(?<n>a|b)\k<n>", "bb", "ab"),
        (r"\bfoo\b", "a foo b", "éfooa"),
        (r"\bfoo\b", "éfoo", "afoo"),  # é is no word character
        ("^(?!a)", "b", "a"),
        ("a(?=b)", "ab", "ac"),
        (r"^(a)\1$", "aa", "a"),
        ("(^a|b)c", "ac", "xac"),
    ],
)
def test_what_is_not_regular_is_for_the_judge(pattern, found, missed):
    assert full_match(pattern, ".*") is None
    assert re.search(search_pattern(pattern), found) and not re.search(search_pattern(pattern), missed)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("a)(b", "unbalanced parenthesis"), ("(a", "missing \\)"), ("[b-a]", "bad character range b-a"),
     ("[a", "unterminated class"), (r"\p{Nonsense}", "unknown property"), ("*a", "nothing to repeat")],
)  # fmt: skip
def test_says_what_is_wrong(pattern, message):
    with pytest.raises(ValueError, match=message):
        search_pattern(pattern)
