"""Potential that asks the whole generated text to be one of some options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ponder.arguments import NAME_WIDTH, shorten
from ponder.automata.automaton import check_table_size
from ponder.potentials.automaton_potential import ByteAutomaton, LanguagePotential

__all__ = ["Options", "choice"]


def choice(options: Sequence[str]) -> LanguagePotential:
    """Constrain the generated text to be one of some options, character by character.

    Φ of a finished trace is 1 if the text before EOS is an option, else 0; Φ of a prefix is 1 if some option
    can still be completed in the tokens that remain, else 0. Every way in which tokens spell an option
    counts, so that the posterior of an option is the probability of its text. An option may begin with
    another one, or be the empty string: EOS then tells them apart. Equal options count once. All characters
    stand for themselves.

    Args:
        options: the texts, as the tokens spell them. A model says "yes" after most chat prompts, and " yes"
            after other prompts, often, and after chat prompts too where a sentencepiece tokenizer (Llama 2's,
            Mistral's) begins a text with a blank: building a program whose options all lack it warns.

    Raises:
        TypeError: `options` is one string, or an option is no string.
        ValueError: there is no option, none but the empty string, or an option is no valid Unicode.

    Example:
        >>> import ponder
        >>> answer = ponder.choice(["yes", "no", "don't know"])
    """
    if isinstance(options, str | bytes):
        raise TypeError(
            f"choice(options): expected several str, got one {type(options).__name__}; for a single option "
            "pass a list of it"
        )
    try:
        # The order of a set differs from process to process.
        found = sorted(options) if isinstance(options, set | frozenset) else list(options)
    except TypeError:
        raise TypeError(f"choice(options): expected several str, got {type(options).__name__}") from None
    wrong = [type(option).__name__ for option in found if not isinstance(option, str)]
    if wrong:
        raise TypeError(f"choice(options): expected str only, got {', '.join(sorted(set(wrong)))} among them")
    if not any(found):
        raise ValueError(f"choice(options): expected at least one text that is not empty, got {found!r}")
    try:
        "".join(found).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"choice(options): expected Unicode text, got lone surrogates: {error}") from error
    return LanguagePotential(Options(tuple(dict.fromkeys(found))))


@dataclasses.dataclass(frozen=True)
class Options:
    """A finite set of texts, in the order given."""

    options: tuple[str, ...]

    def byte_automaton(self) -> ByteAutomaton:
        """Build the smallest automaton of the options: their trie, with equal subtrees merged."""
        children: list[dict[int, int]] = [{}]
        ends = set()
        for option in self.options:
            node = 0
            for byte in option.encode():
                following = children[node].setdefault(byte, len(children))
                if following == len(children):
                    children.append({})
                node = following
            ends.add(node)

        # Children come after their parents, so backwards all subtrees are known when a node is reached.
        rows: list[tuple[tuple[int, int], ...]] = []
        finals: list[int] = []
        states: dict[tuple, int] = {}
        state_of = [0] * len(children)
        for node in range(len(children) - 1, -1, -1):
            row = tuple(sorted((byte, state_of[child]) for byte, child in children[node].items()))
            state_of[node] = states.setdefault((node in ends, row), len(rows))
            if state_of[node] == len(rows):
                rows.append(row)
                if node in ends:
                    finals.append(state_of[node])
        check_table_size(len(rows), 256, 4 * 256 * len(rows))
        table = np.full((len(rows), 256), -1, np.int32)
        for state, row in enumerate(rows):
            for byte, target in row:
                table[state, byte] = target
        return ByteAutomaton(table, state_of[0], finals)

    def __repr__(self) -> str:
        return f"choice({shorten(repr(list(self.options)), NAME_WIDTH)})"
