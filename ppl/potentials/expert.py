"""Products and contrasts of experts: another language model's probability of the text, as a potential.

Target: π(x) ∝ p(x | prompt) p_e(x | prompt_e)^w over whole traces x, with the expert p_e and its weight w. A
positive weight makes a product of experts, a negative one a contrast: what the program's model finds likelier
than the expert does. The expert is a model of its own with its own cache, one forward pass a step.

References:
    Hinton (2002), Training products of experts by minimizing contrastive divergence; Liu et al. (2021),
    DExperts, arXiv:2105.03023, and Li et al. (2023), Contrastive decoding, arXiv:2210.15097, which combine
    the next tokens only: normalised at each token, not over traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ponder.arguments import lacking
from ponder.automata.lifting import token_pieces
from ponder.models.protocols import LanguageModel, capabilities
from ponder.models.pytrees import pytree, static
from ponder.models.rows import fork_rows
from ponder.potentials.combining import Bound, Unbound
from ponder.program.prompts import check_context, encode_prompt, pad_prompts, read_prompts
from ponder.program.ragged import check_ragged, extend_rows, ragged_cache
from ponder.protocols import Context

__all__ = ["Expert", "ExpertPotential", "ExpertState", "expert"]


class ExpertState(NamedTuple):
    """What the expert has read of N traces.

    Attributes:
        cache: the expert's.
        next_log_prob: float32[N, V]; log p_e of the next token.
        log_prob: float32[N]; log p_e of the tokens so far.
        behind: bool[N]; rows whose cache holds padding, see `ExpertPotential.update`.
    """

    cache: Any
    next_log_prob: jax.Array
    log_prob: jax.Array
    behind: jax.Array


@pytree
class Expert(Unbound):
    """What `expert` returns.

    Attributes:
        lm: the expert.
        weight: float32[]; w.
        prompt: int32[1, P] padded, and int32[1], its length; None: the program's.
    """

    lm: LanguageModel
    weight: jax.Array
    prompt: tuple[jax.Array, jax.Array] | None

    def bind(self, context: Context) -> ExpertPotential:
        """Take over the program's prompts and length limit.

        Raises:
            TypeError: there are several prompts, or a step unit, and `lm` cannot take them.
            ValueError: `lm` has another vocabulary than the program's model, or the text may exceed its
                context, or the context has no prompt to take over.
        """
        _check_vocabulary(self.lm, context.lm)
        prompt, prompt_length = self.prompt or self._prompts_of(context)
        check_context(self.lm, int(np.asarray(prompt_length).max()), context.max_new_tokens, "expert: prompt")
        ragged = context.max_unit_tokens not in (None, 1)
        if ragged:
            check_ragged(self.lm, "expert")
        return ExpertPotential(
            self, prompt, prompt_length, max_new_tokens=context.max_new_tokens, ragged=ragged
        )

    def _prompts_of(self, context: Context) -> tuple[jax.Array, jax.Array]:
        if not context.prompts:
            raise ValueError("expert: prompt=None takes the program's prompt, but the context has none")
        if len(context.prompts) > 1 and not capabilities(self.lm).many_prompts:
            raise TypeError(
                f"expert: several prompts need a model with prefill_many; {type(self.lm).__name__} has none"
            )
        with jax.ensure_compile_time_eval():
            return pad_prompts(self.lm, context.prompts)


@pytree
class ExpertPotential(Bound):
    """Φ(x) = p_e(x | prompt_e)^w; see `expert`.

    Attributes:
        unbound: the model and its weight.
        prompt: int32[1 or B, P]; padded.
        prompt_length: int32[1 or B].
        max_new_tokens: the length limit.
        ragged: whether rows wait for each other, as with a step unit.
    """

    unbound: Expert
    prompt: jax.Array
    prompt_length: jax.Array
    max_new_tokens: int = static()
    ragged: bool = static()

    def init(self, num_particles: int) -> ExpertState:
        """See `Potential`."""
        # One slot more than the text has tokens: an EOS may follow it where a program forces one.
        room = self.max_new_tokens + 1
        cache, logits = read_prompts(self.unbound.lm, self.prompt, self.prompt_length, num_particles, room)
        if self.ragged:
            cache = ragged_cache(self.unbound.lm, cache, num_particles)
        return ExpertState(
            cache, _log_softmax(logits), jnp.zeros(num_particles, jnp.float32), jnp.zeros(num_particles, bool)
        )

    def update(self, state: ExpertState, tokens: jax.Array, active: jax.Array) -> ExpertState:
        """See `Potential`; without a step unit, a row that was not active counts as finished.

        Its values do not change, but its cache stays in lock step with the others by reading padding. Should
        it go on later, its values are right for one token and NaN from there, which kernels flag.
        """
        step = jnp.take_along_axis(state.next_log_prob, tokens[:, None], axis=1)[:, 0]
        if self.ragged:
            cache, logits = extend_rows(self.unbound.lm, state.cache, state.next_log_prob, tokens, active)
            return state._replace(
                cache=cache,
                next_log_prob=jnp.where(active[:, None], _log_softmax(logits), state.next_log_prob),
                log_prob=state.log_prob + jnp.where(active, step, 0.0),
            )
        cache, logits = self.unbound.lm.extend(state.cache, tokens)
        # After padding the expert has read another text: a wrong answer must not look like a right one.
        after = jnp.where(state.behind[:, None], jnp.nan, _log_softmax(logits))
        return ExpertState(
            cache=cache,
            next_log_prob=jnp.where(active[:, None], after, state.next_log_prob),
            log_prob=state.log_prob + jnp.where(active, step, 0.0),
            behind=state.behind | ~active,
        )

    def log_prefix(self, state: ExpertState) -> jax.Array:
        """See `Potential`."""
        return self._raise(state.log_prob)

    def log_complete(self, state: ExpertState) -> jax.Array:
        """See `Potential`."""
        return self._raise(state.log_prob)

    def token_logits(self, state: ExpertState) -> jax.Array:
        """See `Potential`."""
        return self._raise(state.next_log_prob)

    def complete_logits(self, state: ExpertState) -> jax.Array:
        """See `BasePotential`."""
        return self._raise(state.next_log_prob)

    def fork(self, state: ExpertState, ancestors: jax.Array) -> ExpertState:
        """See `Potential`."""
        rows = fork_rows(state._replace(cache=None), ancestors)
        return rows._replace(cache=self.unbound.lm.fork(state.cache, ancestors))

    def _raise(self, log_prob: jax.Array) -> jax.Array:
        """Return w · log p_e, with Φ = 0 where p_e = 0 (unless w = 0): a contrast would be infinite there."""
        impossible = log_prob == -jnp.inf
        value = self.unbound.weight * jnp.where(impossible, 0.0, log_prob)
        return jnp.where(impossible & (self.unbound.weight != 0), -jnp.inf, value)


def expert(
    lm: LanguageModel,
    prompt: str | Sequence[dict[str, str]] | Sequence[int] | np.ndarray | jax.Array | None = None,
    weight: float = 1.0,
) -> Expert:
    """Weigh traces by another model's probability of them: Φ(x) = p_e(x | prompt_e)^w.

    The target p(x | prompt) · p_e(x | prompt_e)^w is over traces, evidence included, not token by token; the
    locally optimal proposal is q ∝ p · p_e^w. p_e is the model at temperature 1, and its probability of the
    EOS that ends a trace counts like that of any token. Where p_e(x) = 0, Φ(x) = 0 for a negative weight
    too, whose power would be infinite: the target is on what both models can write. With w = 0, Φ = 1.

    With the program's own model and prompt this is `ponder.power(1 + w)` at twice the cost.

    Args:
        lm: the expert, with the vocabulary of the program's model: the same size, and where both have a
            tokenizer the same EOS ids and bytes of every token.
        prompt: text, chat messages or token ids, as for `ponder.Generation`, encoded by the expert's
            tokenizer; None takes the token ids of the program, of each prompt where there are several.
        weight: w, any finite number or traced scalar; positive is a product, negative a contrast.

    Raises:
        TypeError: `lm` is no `LanguageModel`, or `prompt` of another kind.
        ValueError: `prompt` is empty or has no tokens of `lm`, or `weight` is not finite. When the program is
            built: another vocabulary, or a text beyond the expert's context.
    """
    if isinstance(lm, type) or not isinstance(lm, LanguageModel):
        raise TypeError(
            "lm: expected a LanguageModel (see ponder.models.load), " + lacking(lm, LanguageModel)
        )
    if not _is_finite(weight):
        raise ValueError(f"weight: expected a finite number, got {weight!r}")
    w = jnp.asarray(weight, jnp.float32)
    if prompt is None:
        return Expert(lm, w, None)
    # A program may be built inside jit, and `bind` has to know the length.
    with jax.ensure_compile_time_eval():
        return Expert(lm, w, pad_prompts(lm, [encode_prompt(lm, prompt)]))


def _log_softmax(logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _is_finite(weight: Any) -> bool:
    """Tell whether this is a real scalar within float32; of a traced one, whether it is a real scalar."""
    if isinstance(weight, bool) or not isinstance(weight, int | float | np.number | np.ndarray | jax.Array):
        return False
    dtype = getattr(weight, "dtype", jnp.float32)
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if np.shape(weight) != () or not real:
        return False
    return isinstance(weight, Tracer) or bool(abs(weight) <= float(np.finfo(np.float32).max))


def _check_vocabulary(lm: LanguageModel, program: LanguageModel) -> None:
    """Refuse an expert whose token ids mean something else than in the program's model."""
    if lm.vocab_size != program.vocab_size:
        raise ValueError(
            f"expert: expected the program's vocabulary of {program.vocab_size} tokens, got {lm.vocab_size}"
        )
    if lm.tokenizer is None or program.tokenizer is None:
        return
    if set(lm.eos_token_ids) != set(program.eos_token_ids):
        raise ValueError(
            f"expert: expected the program's eos_token_ids {program.eos_token_ids}, got {lm.eos_token_ids}; "
            "if its probability of those is what you mean, replace its eos_token_ids by them"
        )
    if lm.tokenizer is program.tokenizer:
        return
    pairs = zip(token_pieces(lm, "expert"), token_pieces(program, "expert"), strict=True)
    for token, (found, expected) in enumerate(pairs):
        if found != expected:
            raise ValueError(
                f"expert: expected the program's tokenizer, got another one: token {token} is {found!r} "
                f"in the expert and {expected!r} in the program's model"
            )
