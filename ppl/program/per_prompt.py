"""One potential for each of several prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ponder.bases import BasePotential, log_values
from ponder.foreign import as_evidence, as_potential
from ponder.models.pytrees import pytree
from ponder.protocols import Context, PotentialState

__all__ = ["PerPrompt", "bind_potential"]


def bind_potential(potential: Any, context: Context, num_prompts: int | None) -> BasePotential | None:
    """Make the potential of a program of what its user gave.

    Args:
        potential: a `Potential`, one that has to be bound, or None; with several prompts, also a list of one
            for each.
        context: the program's.
        num_prompts: B, or None for a single prompt.

    Raises:
        TypeError: the potential, or an element of the list, is neither of these.
        ValueError: the list is not as long as that of the prompts. Others come from `bind`.
    """
    if potential is None:
        return None
    if isinstance(potential, list) and num_prompts is None:
        raise TypeError(
            f"potential: expected one for the single prompt, got a list of {len(potential)}; "
            "a * b is a product, and a list is for as many prompts"
        )
    if not isinstance(potential, list | tuple) or num_prompts is None:
        return as_potential(as_evidence(potential).bind(context))
    if len(potential) != num_prompts:
        raise ValueError(f"potential: expected one for each of {num_prompts} prompts, got {len(potential)}")
    for index, single in enumerate(potential):
        if single is None:
            raise TypeError(
                f"potential {index} of {num_prompts}: expected a ponder.Potential, got None; "
                "ponder.power(1.0) is no evidence"
            )
    evidence = [as_evidence(single) for single in potential]  # all are checked before the first is bound
    bound = [single.bind(own) for single, own in zip(evidence, _context_of_each(context), strict=True)]
    return PerPrompt(tuple(map(as_potential, bound)))


def _context_of_each(context: Context) -> list[Context]:
    sources = context.sources or (None,) * len(context.prompts)
    return [
        context._replace(prompts=(prompt,), sources=() if source is None else (source,))
        for prompt, source in zip(context.prompts, sources, strict=True)
    ]


@pytree
class PerPrompt(BasePotential):
    """Rows in as many equal blocks as there are potentials; each judges its own block."""

    potentials: tuple[BasePotential, ...]

    @property
    def num_reward_models(self) -> int:
        """The most of any prompt."""
        return max(p.num_reward_models for p in self.potentials)

    @property
    def withholds(self) -> bool:
        """Whether some prompt's potential is a terminal score."""
        return any(p.withholds for p in self.potentials)

    def init(self, num_particles: int) -> PotentialState:
        """See `Potential`."""
        return tuple(p.init(num_particles // len(self.potentials)) for p in self.potentials)

    def observe(self, state: PotentialState, log_prior: jax.Array) -> PotentialState:
        """See `BasePotential`."""
        return self._each(lambda p, s, x: p.observe(s, x), state, log_prior)

    def update(self, state: PotentialState, tokens: jax.Array, active: jax.Array) -> PotentialState:
        """See `Potential`."""
        return self._each(lambda p, s, t, a: p.update(s, t, a), state, tokens, active)

    def commit(self, state: PotentialState, rows: jax.Array) -> PotentialState:
        """See `BasePotential`."""
        return self._each(lambda p, s, r: p.commit(s, r), state, rows)

    def log_prefix(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return _stacked(self._each(lambda p, s: p.log_prefix(s), state))

    def log_complete(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return _stacked(self._each(lambda p, s: p.log_complete(s), state))

    def judge(self, state: PotentialState, ends: jax.Array) -> jax.Array:
        """See `BasePotential`."""
        return _stacked(self._each(lambda p, s, e: p.judge(s, e), state, ends))

    def judge_apart(self, state: PotentialState, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `BasePotential`."""
        parts = self._each(lambda p, s, e: p.judge_apart(s, e), state, ends)
        at_once, withheld = zip(*parts, strict=True)
        return _stacked(at_once), _stacked(withheld)

    def judge_prefix(self, state: PotentialState, rows: jax.Array) -> jax.Array:
        """See `BasePotential`."""
        return _stacked(self._each(lambda p, s, r: p.judge_prefix(s, r), state, rows))

    def token_logits(self, state: PotentialState) -> jax.Array | None:
        """See `Potential`; None if no potential offers it, and 0 in the blocks of those that do not."""
        return _joined(self._guides(state))

    def complete_logits(self, state: PotentialState) -> jax.Array | None:
        """See `BasePotential`; blocks without it keep their `token_logits`."""
        found = self._each(lambda p, s: p.complete_logits(s), state)
        if all(block is None for block in found):
            return None
        filled = [f if f is not None else g for f, g in zip(found, self._guides(state), strict=True)]
        return _joined(filled)

    def fork(self, state: PotentialState, ancestors: jax.Array) -> PotentialState:
        """See `Potential`; rows continue from rows of their own block."""
        size = ancestors.shape[0] // len(self.potentials)
        return self._each(lambda p, s, a: p.fork(s, a % size), state, ancestors)

    def _guides(self, state: PotentialState) -> tuple[jax.Array | None, ...]:
        return self._each(lambda p, s: p.token_logits(s), state)

    def _each(self, method: Callable[..., Any], state: PotentialState, *rows: jax.Array) -> tuple[Any, ...]:
        """Call `method(potential, state, *rows of its block)` for every block."""
        split = [jnp.split(x, len(self.potentials)) for x in rows]
        return tuple(
            method(p, s, *blocks) for p, s, *blocks in zip(self.potentials, state, *split, strict=True)
        )


def _stacked(blocks: Sequence[jax.Array]) -> jax.Array:
    """Log values of all rows; users' potentials may have them in another float type."""
    return jnp.concatenate([log_values(f"potential {i}", block) for i, block in enumerate(blocks)])


def _joined(blocks: Sequence[jax.Array | None]) -> jax.Array | None:
    """Stack blocks of equal shape; a missing one is 0, which guides nothing. None if all are missing."""
    found = [block for block in blocks if block is not None]
    if not found:
        return None
    return _stacked([jnp.zeros_like(found[0]) if block is None else block for block in blocks])
