"""One potential for each of several prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ponder.bases import BasePotential, UnboundPotential, as_potential
from ponder.models.pytrees import pytree
from ponder.protocols import Context, PotentialState

__all__ = ["PerPrompt", "one_potential"]


def one_potential(
    potential: Any, num_prompts: int | None
) -> BasePotential | UnboundPotential | UnboundPerPrompt | None:
    """Check the potential; make one of a list with a potential for each prompt.

    Raises:
        TypeError: it is none.
        ValueError: a list is not as long as the list of prompts.
    """
    if isinstance(potential, list | tuple) and num_prompts is not None:
        if len(potential) != num_prompts:
            raise ValueError(
                f"potential: expected one for each of {num_prompts} prompts, got {len(potential)}"
            )
        for index, single in enumerate(potential):
            if single is None:
                raise TypeError(
                    f"potential {index} of {num_prompts}: expected a ponder.Potential, got None; "
                    "ponder.power(1.0) is no evidence"
                )
        return UnboundPerPrompt(tuple(one_potential(single, None) for single in potential))
    if potential is None or isinstance(potential, UnboundPotential):
        return potential
    return as_potential(potential)


class UnboundPerPrompt(NamedTuple):
    """What `ponder.Generation` makes of a list of potentials; each may have to be bound."""

    potentials: tuple[Any, ...]

    def bind(self, context: Context) -> PerPrompt:
        """Bind each potential to its own prompt."""
        sources = context.sources or (None,) * len(context.prompts)
        contexts = [
            context._replace(prompts=(prompt,), sources=() if source is None else (source,))
            for prompt, source in zip(context.prompts, sources, strict=True)
        ]
        bound = [p.bind(c) for p, c in zip(self.potentials, contexts, strict=True)]
        return PerPrompt(tuple(as_potential(p) for p in bound))


@pytree
class PerPrompt(BasePotential):
    """Rows in as many equal blocks as there are potentials; each judges its own block."""

    potentials: tuple[BasePotential, ...]

    @property
    def num_reward_models(self) -> int:
        """The most of any prompt."""
        return max(p.num_reward_models for p in self.potentials)

    def init(self, num_particles: int) -> PotentialState:
        """See `Potential`."""
        return tuple(p.init(num_particles // len(self.potentials)) for p in self.potentials)

    def observe(self, state: PotentialState, log_prior: jax.Array) -> PotentialState:
        """See `Potential`."""
        return self._each(lambda p, *given: p.observe(*given), state, log_prior)

    def update(self, state: PotentialState, tokens: jax.Array, active: jax.Array) -> PotentialState:
        """See `Potential`."""
        return self._each(lambda p, s, t, a: p.update(s, t, a), state, tokens, active)

    def commit(self, state: PotentialState, rows: jax.Array) -> PotentialState:
        """See `Potential`."""
        return self._each(lambda p, *given: p.commit(*given), state, rows)

    def log_prefix(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return jnp.concatenate(self._each(lambda p, s: p.log_prefix(s), state))

    def log_complete(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return jnp.concatenate(self._each(lambda p, s: p.log_complete(s), state))

    def judge(self, state: PotentialState, ends: jax.Array) -> jax.Array:
        """See `Potential`."""
        return jnp.concatenate(self._each(lambda p, *given: p.judge(*given), state, ends))

    def judge_prefix(self, state: PotentialState, rows: jax.Array) -> jax.Array:
        """See `Potential`."""
        return jnp.concatenate(self._each(lambda p, *given: p.judge_prefix(*given), state, rows))

    def token_logits(self, state: PotentialState) -> jax.Array | None:
        """See `Potential`; None if no potential offers it, and 0 in the blocks of those that do not."""
        return _joined(self._guides(state))

    def complete_logits(self, state: PotentialState) -> jax.Array | None:
        """See `Potential`; blocks without it keep their `token_logits`."""
        found = self._each(lambda p, *given: p.complete_logits(*given), state)
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


def _joined(blocks: Sequence[jax.Array | None]) -> jax.Array | None:
    """Stack blocks of equal shape; a missing one is 0, which guides nothing. None if all are missing."""
    found = [block for block in blocks if block is not None]
    if not found:
        return None
    nothing = jnp.zeros_like(found[0])
    return jnp.concatenate([nothing if block is None else block for block in blocks])
