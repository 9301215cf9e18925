"""A language model, a prompt and a potential as one state-space model: the program that kernels run.

The target is π(x) ∝ p(x | prompt) Φ(x) over traces x that end with an EOS token, with a stop string, or at
`max_new_tokens`; the evidence is Z = Σ_x p(x | prompt) Φ(x). Neither the proposal nor the potentials of
unfinished prefixes change it. Several prompts are as many independent inferences, run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_pytree_node_class

from ponder.models.protocols import LanguageModel
from ponder.models.rows import fork_rows
from ponder.per_prompt import one_potential
from ponder.prompts import Prompt, describe_prompts, encode_prompts, pad_prompts, read_prompts
from ponder.protocols import (
    Context,
    Move,
    Potential,
    Traces,
    bind,
    complete_logits,
    judge,
    judge_prefix,
    lacking,
    observe,
)
from ponder.rejection import adaptive_rejection
from ponder.sampling import PriorSettings, draw, log_prior
from ponder.stop import StopAutomaton, compile_stop

__all__ = ["Generation", "GenerationState", "Proposal"]

Proposal = Callable[[jax.Array, jax.Array | None], jax.Array] | Literal["rejection"]
"""`proposal(log_prior[N, V], token_logits[N, V] or None) -> log q[N, V]`, unnormalised; pure, traceable.
"rejection": see `Generation`."""


class GenerationState(NamedTuple):
    """N rows of partial traces; with several prompts, as many blocks of equal size.

    Attributes:
        cache: the language model's.
        logits: float32[N, V]; of the next token.
        tokens: int32[N, T]; the traces, padded.
        lengths: int32[N]; tokens so far, EOS included.
        done: bool[N]; finished traces.
        stop: int32[N]; progress through the stop strings, or None.
        potential: the potential's state, or None.
        log_potential: float32[N]; log Φ so far; 0 before the first step, whose weight includes log Φ of the
            empty trace.
        log_prior: float32[N]; log p of the tokens so far.
        step: int32[]; steps taken.
    """

    cache: Any
    logits: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array
    stop: jax.Array | None
    potential: Any
    log_potential: jax.Array
    log_prior: jax.Array
    step: jax.Array


@register_pytree_node_class
class Generation:
    """Generation from a language model under evidence; see the module for its target.

    Args:
        lm: the language model.
        prompt: text (encoded as it stands, after BOS where the tokenizer adds one), chat messages
            (`[{"role": ..., "content": ...}]`, rendered by the chat template), or token ids. A list of such
            prompts is a batch: each has its own particles, evidence and posterior, and kernels return a list.
        max_new_tokens: T >= 1, the most tokens a trace may have, EOS included.
        potential: evidence; None means Φ = 1. With several prompts, one for all or a list of one for each.
        proposal: None draws from q ∝ p · exp(token_logits) where the potential offers `token_logits` (the
            locally optimal proposal) and from p elsewhere; a function gives log q, see `Proposal`. q must
            be positive wherever p · Φ is. "rejection" draws from the same q restricted to the tokens after
            which Φ > 0, by adaptive weighted rejection (`ponder.rejection`): for hard constraints that have
            no `token_logits`, such as `ponder.text` with a `prefix`; it checks a few candidates a step
            instead of the vocabulary, and the weights stay exact.
        temperature: of the prior, with top_k, top_p and min_p, as in Hugging Face `generate`.
        top_k: see `ponder.sampling.PriorSettings`.
        top_p: see there.
        min_p: see there.
        unit: "token"; steps are the work of a later release.
        stop: strings and token ids that end a trace; the text keeps them.
        overflow: "truncate": a trace cut at `max_new_tokens` is complete as it is. "force_eos": its last
            token must be EOS (or end a stop string) and is weighted with p(EOS), so that the target is p
            conditioned to end in time, and the evidence includes the probability that it does.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind; before any compilation.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int,
        potential: Potential | Sequence[Potential] | None = None,
        proposal: Proposal | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        unit: str = "token",
        stop: str | int | Sequence[str | int] = (),
        overflow: str = "truncate",
    ):
        if isinstance(lm, type) or not isinstance(lm, LanguageModel):
            raise TypeError(
                "lm: expected a LanguageModel (see ponder.models.load), " + lacking(lm, LanguageModel)
            )
        whole = isinstance(max_new_tokens, int | np.integer) and not isinstance(max_new_tokens, bool)
        if not whole or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected an integer >= 1, got {max_new_tokens!r}")
        if proposal is not None and proposal != "rejection" and not callable(proposal):
            raise TypeError(f"proposal: expected a function, 'rejection' or None, got {proposal!r}")
        if unit != "token":
            raise ValueError(f"unit: expected 'token', got {unit!r}")
        if overflow not in ("truncate", "force_eos"):
            raise ValueError(f"overflow: expected 'truncate' or 'force_eos', got {overflow!r}")
        wrong = [i for i in lm.eos_token_ids if not 0 <= i < lm.vocab_size]
        if wrong:
            raise ValueError(f"lm: eos_token_ids {wrong} are outside its vocabulary of {lm.vocab_size}")
        self.lm = lm
        self.max_new_tokens = int(max_new_tokens)
        self.settings = PriorSettings(temperature, top_k, top_p, min_p)
        self.overflow = overflow
        prompts, is_batch = encode_prompts(lm, prompt, self.max_new_tokens)
        self.num_prompts: int | None = len(prompts) if is_batch else None
        self.prompt, self.prompt_length = pad_prompts(lm, prompts)
        self.stop: StopAutomaton | None = compile_stop(stop, lm)
        if overflow == "force_eos" and not lm.eos_token_ids and self.stop is None:
            raise ValueError("overflow: 'force_eos' needs a model with EOS tokens or a stop string")
        # Where the last token has to be EOS, the text has one token fewer; a stop string may use them all.
        room = self.max_new_tokens - (overflow == "force_eos" and self.stop is None)
        potential = one_potential(potential, self.num_prompts)
        self.potential = None if potential is None else bind(potential, Context(lm, room, prompts))
        self.proposal = proposal

    def __repr__(self) -> str:
        return (
            f"Generation({self.lm!r}, {describe_prompts(self.num_prompts, self.prompt_length)}, "
            f"max_new_tokens={self.max_new_tokens}, potential={type(self.potential).__name__}, "
            f"overflow={self.overflow!r})"
        )

    def tree_flatten(self):
        """Arrays and pytrees as children; settings as static data."""
        children = (self.lm, self.prompt, self.prompt_length, self.stop, self.potential)
        return children, (
            self.num_prompts,
            self.max_new_tokens,
            self.settings,
            self.overflow,
            self.proposal,
        )

    @classmethod
    def tree_unflatten(cls, aux, children):
        """Rebuild without validating: the children may be tracers."""
        self = object.__new__(cls)
        self.lm, self.prompt, self.prompt_length, self.stop, self.potential = children
        self.num_prompts, self.max_new_tokens, self.settings, self.overflow, self.proposal = aux
        return self

    @property
    def num_steps(self) -> int:
        """Steps that finish every trace: one a token."""
        return self.max_new_tokens

    @property
    def tokenizer(self):
        """The language model's."""
        return self.lm.tokenizer

    def init(self, key: jax.Array, num_particles: int) -> GenerationState:
        """Read the prompt and return `num_particles` empty traces of each; nothing is random."""
        del key
        n = num_particles * (self.num_prompts or 1)
        cache, logits = read_prompts(self.lm, self.prompt, self.prompt_length, n, self.max_new_tokens)
        return GenerationState(
            cache=cache,
            logits=logits.astype(jnp.float32),
            tokens=jnp.full((n, self.max_new_tokens), self._pad, jnp.int32),
            lengths=jnp.zeros(n, jnp.int32),
            done=jnp.zeros(n, bool),
            stop=None if self.stop is None else self.stop.init(n),
            potential=None if self.potential is None else self.potential.init(n),
            log_potential=jnp.zeros(n, jnp.float32),
            log_prior=jnp.zeros(n, jnp.float32),
            step=jnp.int32(0),
        )

    def propagate(
        self, key: jax.Array, state: GenerationState, forced: tuple[jax.Array, Move] | None = None
    ) -> tuple[GenerationState, Move, jax.Array]:
        """Draw one token a particle, weigh it and read it; see `StateSpaceModel.propagate`."""
        active = ~state.done
        last = state.step == self.max_new_tokens - 1
        prior = log_prior(state.logits, self.settings)
        potential = state.potential
        if self.potential is not None:
            potential = observe(self.potential, potential, prior)

        # Propose
        log_q = self._log_proposal(state, potential, prior, last)
        is_prior = log_q is None
        log_q = prior if log_q is None else log_q
        if self.proposal == "rejection":
            tokens, normaliser = self._reject(key, state, potential, log_q, active)
        else:
            tokens = self._draw(key, log_q)
            normaliser = jnp.zeros(active.shape) if is_prior else jax.nn.logsumexp(log_q, axis=-1)
        if forced is not None:
            mask, move = forced
            tokens = jnp.where(mask, move.tokens, tokens)
            if self.proposal == "rejection":  # an estimate: the one that was recorded with the move
                normaliser = jnp.where(mask, _at(log_q, tokens) - move.log_proposal, normaliser)
        tokens = jnp.where(active, tokens, self._pad)

        # Weight
        log_p = _at(prior, tokens)
        log_q_token = _at(log_q, tokens) - normaliser
        ends, stop = self._ends(state, tokens)
        if self.overflow == "force_eos":
            log_p = jnp.where(last & ~ends, -jnp.inf, log_p)
        ends = active & (ends | last)
        potential, log_potential = self._judge(potential, tokens, active, ends)
        # The factor that a trace of weight zero already has stays; -inf - -inf would be NaN.
        dead = (state.log_potential == -jnp.inf) | (log_p == -jnp.inf) | (log_potential == -jnp.inf)
        log_weight = jnp.where(dead, -jnp.inf, log_p - log_q_token + log_potential - state.log_potential)
        # A row whose proposal has no mass cannot go on; a NaN normaliser has to show.
        log_weight = jnp.where(normaliser == -jnp.inf, -jnp.inf, log_weight)

        # Read, unless every trace is finished: a loop of no or one trip, whose carry XLA updates in place.
        def read(_: Any, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            cache, logits = self.lm.extend(carry[0], tokens)
            return cache, logits.astype(jnp.float32)

        trips = jnp.where((active & ~ends).any(), 1, 0)
        cache, logits = jax.lax.fori_loop(0, trips, read, (state.cache, state.logits))
        state = state._replace(
            cache=cache,
            logits=logits,
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, tokens[:, None], state.step, axis=1),
            lengths=state.lengths + active,
            done=state.done | ends,
            stop=stop,
            potential=potential,
            log_potential=jnp.where(active, log_potential, state.log_potential),
            log_prior=state.log_prior + jnp.where(active, log_p, 0.0),
            step=state.step + 1,
        )
        move = Move(tokens, jnp.where(active, log_q_token, 0.0))
        return state, move, jnp.where(active, log_weight, 0.0)

    def fork(self, state: GenerationState, ancestors: jax.Array) -> GenerationState:
        """Let row n continue from what was row `ancestors[n]`."""
        rows = state._replace(cache=None, potential=None, step=None)
        return fork_rows(rows, ancestors)._replace(
            cache=self.lm.fork(state.cache, ancestors),
            potential=None if self.potential is None else self.potential.fork(state.potential, ancestors),
            step=state.step,
        )

    def is_done(self, state: GenerationState) -> jax.Array:
        """Tell which traces are finished, `bool[N]`."""
        return state.done

    def traces(self, state: GenerationState) -> Traces:
        """Return what the particles say, and log p and log Φ of it."""
        return Traces(state.tokens, state.lengths, state.log_prior, state.log_potential)

    def _draw(self, key: jax.Array, log_q: jax.Array) -> jax.Array:
        """Draw a token a row; with several prompts from a key for each, as if it were run alone."""
        if self.num_prompts is None:
            return draw(key, log_q)
        blocks = log_q.reshape(self.num_prompts, -1, log_q.shape[-1])
        return jax.vmap(draw)(key, blocks).reshape(-1)

    def _reject(
        self, key: jax.Array, state: GenerationState, potential: Any, log_q: jax.Array, active: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Draw from q where log Φ > -inf; return the tokens and an estimate of log Σ q there."""

        def draw_round(i: jax.Array, log_pool: jax.Array) -> jax.Array:
            fold_in = (
                jax.random.fold_in if self.num_prompts is None else jax.vmap(jax.random.fold_in, (0, None))
            )
            return self._draw(fold_in(key, i), log_pool)

        def accepts(tokens: jax.Array, rows: jax.Array) -> jax.Array:
            ends = self._ends(state, tokens)[0] | (state.step == self.max_new_tokens - 1)
            # A NaN counts as accepted, so that its weight shows it.
            return self._judge(potential, tokens, rows, rows & ends)[1] != -jnp.inf

        return adaptive_rejection(draw_round, accepts, log_q, active & (state.log_potential > -jnp.inf))

    @property
    def _pad(self) -> int:
        return self.lm.eos_token_ids[0] if self.lm.eos_token_ids else 0

    @property
    def _eos_mask(self) -> jax.Array:
        """Which tokens are EOS, bool[1, V]."""
        mask = np.zeros((1, self.lm.vocab_size), bool)
        mask[0, list(self.lm.eos_token_ids)] = True
        return jnp.asarray(mask)

    def _log_proposal(
        self, state: GenerationState, potential: Any, prior: jax.Array, last: jax.Array
    ) -> jax.Array | None:
        """Unnormalised log q [N, V]; None where q is the prior itself."""
        guide = None
        if self.potential is not None:
            guide = self.potential.token_logits(potential)
            if guide is not None:
                guide = _checked("potential.token_logits", guide, prior.shape)
        stops = None if self.stop is None or state.stop is None else self.stop.stops_now(state.stop)
        if guide is not None and self.potential is not None:
            complete = complete_logits(self.potential, potential)
            if complete is not None:
                finishes = (last if stops is None else stops | last) & ~self._eos_mask
                guide = jnp.where(finishes, complete, guide)
        if callable(self.proposal):
            log_q = _checked("proposal", self.proposal(prior, guide), prior.shape)
        elif guide is not None:
            log_q = prior + guide
        elif self.overflow == "force_eos":
            log_q = prior
        else:
            return None
        if self.overflow == "force_eos":
            may_end = self._eos_mask if stops is None else self._eos_mask | stops
            log_q = jnp.where(last & ~may_end, -jnp.inf, log_q)
        return log_q

    def _ends(self, state: GenerationState, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Which traces end with these tokens by EOS or a stop, and the new progress of the stops."""
        ends = self._eos_mask[0, tokens]
        if self.stop is None or state.stop is None:
            return ends, None
        stop = jnp.where(state.done, state.stop, self.stop.advance(state.stop, tokens))
        return ends | self.stop.is_stopped(stop), stop

    def _judge(
        self, potential: Any, tokens: jax.Array, active: jax.Array, ends: jax.Array
    ) -> tuple[Any, jax.Array]:
        """Update the potential and return log Φ: of the complete trace where it ends, else of the prefix."""
        judged = self.potential
        if judged is None:
            return None, jnp.zeros(tokens.shape, jnp.float32)
        potential = judged.update(potential, tokens, active)
        # A branch, since judging complete traces may call the host.
        complete = jax.lax.cond(
            ends.any(),
            lambda state: _checked("potential.log_complete", judge(judged, state, ends), tokens.shape),
            lambda _: jnp.zeros(tokens.shape, jnp.float32),
            potential,
        )
        prefix = judge_prefix(judged, potential, active & ~ends)
        prefix = _checked("potential.log_prefix", prefix, tokens.shape)
        return potential, jnp.where(ends, complete, prefix)


def _checked(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return what a user's function gave as float32, or say what is wrong with its shape or dtype."""
    array = jnp.asarray(value)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: expected real numbers (natural logs), got dtype {array.dtype}")
    return array.astype(jnp.float32)


def _at(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, tokens[:, None], axis=1)[:, 0]
