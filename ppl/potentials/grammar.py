"""Potential that asks the whole generated text to be in the language of a context-free grammar."""

from __future__ import annotations

from ponder.models.pytrees import pytree, static
from ponder.potentials.combining import Unbound
from ponder.potentials.grammar_matching import Matchers, shortened
from ponder.potentials.hosted import HostedPotential, bind_matchers, text_pieces
from ponder.protocols import Context

__all__ = ["Grammar", "grammar"]


def grammar(text: str) -> Grammar:
    r"""Constrain the generated text to the language of a context-free grammar.

    Φ of a finished trace is 1 if the text before EOS is in the language, else 0. Φ of a prefix is 1 while the
    parser can still continue it and, once no further token may follow, if it is in the language. It only
    steers. Unlike `regex` it does not know how many tokens a text still needs: a particle may meet the length
    limit with brackets open, and has weight zero then.

    The syntax is llguidance's, close to Lark's: rules in lower case, beginning with `start`; terminals in
    upper case, strings "..." and regular expressions /.../; `%ignore`, `%json {schema}`. The parser reads
    bytes: any way to cut a text into tokens is allowed, also through a character. Special tokens that have no
    text are never allowed, except EOS.

    The language is what llguidance's lexer makes of the rules. A terminal is read as far as it goes, and is
    not cut shorter for the sake of what follows: `start: A "ab"`, `A: /a+/` refuses "aab", where `start: A+
    "b"`, `A: "a"` is fine. Rules have no such limit: write what needs looking ahead as rules.

    The parser runs on the host, once a step for all particles. If it meets one of llguidance's limits (an
    ambiguous grammar on a long text), the run stops with a RuntimeError that has its message; such texts get
    no weight in silence.

    Args:
        text: the grammar.

    Raises:
        TypeError: the text is no string.
        ValueError: the text is empty, or no valid Unicode.

    Example:
        >>> import ponder
        >>> brackets = ponder.grammar('start: ("(" start ")")*')
    """
    if not isinstance(text, str):
        raise TypeError(f"grammar(text): expected a str, got {type(text).__name__}")
    if not text.strip():
        raise ValueError(f'grammar(text): expected rules such as \'start: "a" start | "b"\', got {text!r}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"grammar(text): expected Unicode text, got lone surrogates: {error}") from error
    return Grammar(text)


@pytree
class Grammar(Unbound):
    """What `grammar` returns: a grammar, whatever the model's tokens."""

    text: str = static()

    def bind(self, context: Context) -> HostedPotential:
        """Compile the grammar for a model's vocabulary.

        Raises:
            ImportError: llguidance is not installed.
            ValueError: the model has no tokenizer, llguidance refuses the grammar, or no text can begin.
        """
        matchers = Matchers.compile(self.text, text_pieces(context, repr(self)))
        return bind_matchers(self, matchers, context)

    def __repr__(self) -> str:
        return shortened(self.text)
