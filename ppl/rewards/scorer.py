"""Scorers read a trace unit by unit and score it: a reward model with its cache and prompt, for example."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ponder.arguments import lacking
from ponder.models.protocols import RewardModel, capabilities
from ponder.models.pytrees import pytree, static
from ponder.models.step_form import StepForm
from ponder.program.prompts import pad_prompts, read_prompts
from ponder.program.ragged import check_ragged, extend_rows
from ponder.protocols import Context
from ponder.rewards.blanks import Blanks, compile_blanks
from ponder.rewards.judge_prompts import given_prompts, translate_prompts
from ponder.rewards.retokenise import Leftover, Retokeniser, reads_same_ids

__all__ = ["ModelScorer", "Scorer", "UnboundModelScorer", "UnboundScorer", "model_scorer"]


class Scorer(Protocol):
    """Scores N traces that come in units; `ponder.process_reward` makes evidence of the scores.

    The methods are pure and jit-traceable, and the object is best a pytree.
    """

    @property
    def unbound(self) -> UnboundScorer:
        """What it was made of, to fit to another program."""
        ...

    @property
    def of_text(self) -> bool:
        """Whether scores depend on the text of the units alone, not on how it is cut into tokens."""
        ...

    def start(self, num_rows: int) -> Any:
        """Return the cache of `num_rows` empty traces, in as many equal blocks as there are prompts."""
        ...

    def read(
        self, cache: Any, tokens: jax.Array, lengths: jax.Array, visible: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array]:
        """Append the first `lengths[n]` of the program's `tokens[N, C]` to row n as one unit; score it.

        Where not `visible[N]` the unit has nothing but blanks and its delimiter: it is not scored.

        Returns the cache, `scores[N]`, and which rows were scored: not those that got no text.
        """
        ...

    def fork(self, cache: Any, ancestors: jax.Array) -> Any:
        """Let row n continue from what was row `ancestors[n]`."""
        ...


class UnboundScorer(Protocol):
    """What a scorer is made of when a program is built."""

    def bind(self, context: Context) -> Scorer:
        """Fit to a program's model, prompts and limits; outside jit."""
        ...


class ScorerCache(NamedTuple):
    """The model's cache, and what the translation remembers (None where ids are shared)."""

    model: Any
    leftover: Leftover | None


@pytree
class UnboundModelScorer:
    """A reward model and what it reads before the trace; made by `model_scorer`.

    Attributes:
        prm: the reward model.
        own_prompts: the prompts that it reads instead of the program's, or None.
        max_step_tokens: of a unit in its tokens, where they are not the program's; None for the default.
    """

    prm: Any
    own_prompts: tuple[tuple[int, ...], ...] | None = static()
    max_step_tokens: int | None = static()

    def bind(self, context: Context) -> ModelScorer:
        """Choose the prompt, the tokens and the room; see `ponder.process_reward` for what is refused."""
        check_ragged(self.prm, "prm")
        has = capabilities(self.prm)
        shared = reads_same_ids(self.prm, context.lm)
        rewrites = has.form is not None and has.form.rewrites
        by_text = self.prm.tokenizer is not None and context.lm.tokenizer is not None
        by_text &= rewrites or not shared
        prompts = self._prompts(context, shared)
        units = min(context.max_units or context.max_new_tokens, context.max_new_tokens)
        form = has.form or StepForm()
        translation = self._translation(context, form, units, shared) if by_text else None
        text = context.max_new_tokens if translation is None else translation.max_tokens
        separator = len(has.separator)
        room = text + units * separator
        longest = max(map(len, prompts))
        if has.max_length is not None and longest + room > has.max_length:
            raise ValueError(
                f"process_reward: a prompt of {longest} tokens, {text} tokens of text and {units} separators "
                f"of {separator} tokens exceed the reward model's context of {has.max_length}"
            )
        with jax.ensure_compile_time_eval():  # a program may be built inside jit
            prompt, length = pad_prompts(self.prm, prompts)
        # Without text, delimiters can still be cut off.
        blanks = compile_blanks(context) if rewrites and not by_text else None
        return ModelScorer(self, prompt, length, blanks, room, translation)

    def _prompts(self, context: Context, shared: bool) -> list[tuple[int, ...]]:
        count = max(len(context.prompts), 1)
        if self.own_prompts is not None:
            if len(self.own_prompts) not in (1, count):
                raise ValueError(
                    f"process_reward: expected one prompt, or one for each of the program's {count}, "
                    f"got {len(self.own_prompts)}"
                )
            prompts = list(self.own_prompts)
        elif not context.prompts:
            raise ValueError(
                "process_reward: prompt=None takes the program's prompt, but the context has none"
            )
        else:
            form = capabilities(self.prm).form
            as_they_are = shared and (form is None or form.question == "as given")
            if as_they_are or context.lm.tokenizer is None or self.prm.tokenizer is None:
                prompts = list(context.prompts)
            else:
                prompts = translate_prompts(self.prm, context, shared=shared)
        if len(prompts) > 1 and not capabilities(self.prm).many_prompts:
            raise TypeError(
                "process_reward: several prompts need a reward model with prefill_many; "
                f"{type(self.prm).__name__} has none"
            )
        return prompts

    def _translation(self, context: Context, form: StepForm, units: int, shared: bool) -> Retokeniser:
        width = context.max_unit_tokens or context.max_new_tokens
        assert context.lm.tokenizer is not None and self.prm.tokenizer is not None
        encode = self.prm.tokenizer.encode
        if self.max_step_tokens is None:
            # And what the form puts before each step.
            more = max((len(encode(opening)) for opening in (form.first, form.between) if opening), default=0)
            times = 1 if shared else 2  # in the same tokens a text is hardly longer than it was written
            step, total = times * width + 16 + more, times * context.max_new_tokens + 16 + units * more
        else:
            step = self.max_step_tokens
            total = -(-context.max_new_tokens // width) * step
        bytes_of = context.lm.tokenizer.token_bytes
        return Retokeniser(bytes_of, encode, step, total, form, context.delimiters)


@pytree
class ModelScorer:
    """A reward model as a `Scorer`.

    Attributes:
        unbound: the reward model, whatever the program.
        prompt: int32[B, P]; what it reads before the trace, padded.
        prompt_length: int32[B].
        blanks: finds the delimiters that the model's form leaves out; None where text is translated, or read
            as it is.
        room: tokens that its cache has to take after the prompt.
        translation: from the program's tokens to its own; None where they are the same.
    """

    unbound: UnboundModelScorer
    prompt: jax.Array
    prompt_length: jax.Array
    blanks: Blanks | None
    room: int = static()
    translation: Retokeniser | None = static()

    @property
    def of_text(self) -> bool:
        """See `Scorer`: a model that reads the program's own ids also sees how they are cut."""
        return self.translation is not None

    def start(self, num_rows: int) -> ScorerCache:
        """See `Scorer`."""
        cache, _ = read_prompts(self.unbound.prm, self.prompt, self.prompt_length, num_rows, self.room)
        nothing = jnp.zeros((num_rows, 1), jnp.int32), jnp.zeros(num_rows, jnp.int32)
        types = jax.eval_shape(lambda: (cache, self._extend(cache, *nothing)[0]))
        if _signature(types[0]) != _signature(types[1]):
            # A count for all rows has become one for each, say. Loops need one type from the start.
            cache, _ = self._extend(cache, *nothing)
        return ScorerCache(cache, None if self.translation is None else self.translation.init(num_rows))

    def read(
        self, cache: ScorerCache, tokens: jax.Array, lengths: jax.Array, visible: jax.Array
    ) -> tuple[ScorerCache, jax.Array, jax.Array]:
        """See `Scorer`; the model does not read what is not visible."""
        leftover = cache.leftover
        if self.translation is not None and leftover is not None:
            leftover, tokens, lengths = self.translation.translate(leftover, tokens, lengths, visible)
        else:
            lengths = jnp.where(visible, lengths, 0)
        if self.blanks is not None:
            lengths = lengths - self.blanks.trailing(tokens, lengths)
        model, scores = self._extend(cache.model, tokens, lengths)
        if scores.shape != lengths.shape:
            raise ValueError(f"prm: expected scores of shape {lengths.shape}, got {scores.shape}")
        return ScorerCache(model, leftover), scores.astype(jnp.float32), lengths > 0

    def fork(self, cache: ScorerCache, ancestors: jax.Array) -> ScorerCache:
        """See `Scorer`."""
        leftover = jax.tree.map(lambda x: x[ancestors], cache.leftover)
        return ScorerCache(self.unbound.prm.fork(cache.model, ancestors), leftover)

    def _extend(self, cache: Any, tokens: jax.Array, lengths: jax.Array) -> tuple[Any, jax.Array]:
        """Append a unit `tokens[N, C]`, of `lengths[N]`; by single tokens where the model knows no blocks."""
        has = capabilities(self.unbound.prm)
        if has.blocks:
            return self.unbound.prm.extend_block(cache, tokens, lengths)
        separator = has.separator
        num_rows, width = tokens.shape
        tokens = jnp.pad(tokens, ((0, 0), (0, len(separator))))
        for place, token in enumerate(separator):
            column = jnp.minimum(lengths, width) + place
            tokens = tokens.at[jnp.arange(num_rows, dtype=jnp.int32), column].set(token)
        lengths = jnp.where(lengths > 0, lengths + len(separator), 0)

        def read(i: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            return extend_rows(self.unbound.prm, *carry, jnp.where(i < lengths, tokens[:, i], 0), i < lengths)

        return jax.lax.fori_loop(0, lengths.max(), read, (cache, jnp.zeros(num_rows, jnp.float32)))


def model_scorer(
    prm: RewardModel, prompt: Any = None, max_step_tokens: int | None = None
) -> UnboundModelScorer:
    """Make a scorer of a reward model; the arguments are those of `ponder.process_reward`."""
    if isinstance(prm, type) or not isinstance(prm, RewardModel):
        raise TypeError(
            "prm: expected a RewardModel (see ponder.models.load_reward) or a ponder.text_reward, "
            + lacking(prm, RewardModel)
        )
    whole = isinstance(max_step_tokens, int | np.integer) and not isinstance(max_step_tokens, bool)
    if max_step_tokens is not None and not (whole and max_step_tokens >= 1):
        raise ValueError(f"max_step_tokens: expected an integer >= 1 or None, got {max_step_tokens!r}")
    own = None
    if prompt is not None:
        own = given_prompts(prm, prompt)
    return UnboundModelScorer(prm, own, None if max_step_tokens is None else int(max_step_tokens))


def _signature(tree: Any) -> Any:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
