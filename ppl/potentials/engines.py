"""Which engine holds a language: the automaton inside jit where it fits, else one on the host."""

from __future__ import annotations

from typing import Any, Protocol

from ponder.automata.automaton import AutomatonError
from ponder.bases import BasePotential
from ponder.models.pytrees import pytree, static
from ponder.potentials.automaton_potential import Language, LanguagePotential
from ponder.potentials.combining import Unbound
from ponder.protocols import Context

__all__ = ["EngineChoice", "HostLanguage", "check_engine", "with_engine"]

ENGINES = ("auto", "automaton", "host")


class HostLanguage(Protocol):
    """A set of texts that the host knows; hashable and compared by value, as a `Language` is."""

    def bind(self, unbound: Unbound, context: Context) -> BasePotential:
        """Make the potential; ValueError says why that cannot be done."""
        ...


def check_engine(name: str, engine: Any) -> str:
    """Return an engine's name.

    Raises:
        ValueError: it is not `ENGINES`.
    """
    if engine not in ENGINES:
        raise ValueError(f"{name}(engine): expected 'auto', 'automaton' or 'host', got {engine!r}")
    return engine


def with_engine(shown: str, engine: str, **more: Any) -> str:
    """Add to the repr of a description which engine is in use, and what there is to say of it."""
    facts = {"engine": engine, **{name: value for name, value in more.items() if value}}
    return f"{shown.removesuffix(')')}, {', '.join(f'{name}={value!r}' for name, value in facts.items())})"


@pytree
class EngineChoice(LanguagePotential):
    """What `regex` and `json_schema` return: a language, whatever the model's tokens and the engine.

    Attributes:
        language: for the automaton; None where that is known not to hold it.
        hosted: the same language for the host.
        engine: "auto", "automaton" or "host".
    """

    language: Language | None = static()
    hosted: HostLanguage = static()
    engine: str = static()

    def bind(self, context: Context) -> BasePotential:
        """Compile the language for a model's vocabulary, on the first engine that holds it.

        Raises:
            ImportError: an engine is needed and not installed.
            ValueError: the model has no tokenizer, no engine holds the language, or none of its texts can be
                written in `max_new_tokens` tokens.
        """
        if self.engine != "host" and self.language is not None:
            try:
                return super().bind(context)
            except AutomatonError:
                if self.engine == "automaton":
                    raise
        return self.hosted.bind(self, context)

    def on_engine(self, engine: str) -> str:
        """Return the repr of the potential on an engine."""
        return with_engine(repr(self), engine)

    def __repr__(self) -> str:
        return repr(self.language or self.hosted)
