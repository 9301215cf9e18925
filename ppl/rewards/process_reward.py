"""Likelihoods from a process reward model (PRM): its judgement after each unit of a trace, as evidence.

A PRM says how probable it is that the trace so far is right. That is no likelihood yet: the link says which
function of the judgements Φ is, so that the target p(x | prompt) Φ(x) is stated and not implied.

References:
    Puri et al. (2025), A probabilistic inference approach to inference-time scaling of LLMs using
    particle-based Monte Carlo methods, arXiv:2502.01618: resampling on softmax of the logit of the last
    score, which is the link "odds" with multinomial resampling after every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ponder.models.protocols import RewardModel
from ponder.models.pytrees import pytree, static
from ponder.potentials.combining import Bound, Unbound
from ponder.protocols import Context
from ponder.rewards.blanks import Blanks, compile_blanks
from ponder.rewards.links import AGGREGATES, LINKS, Judgements, Likelihood
from ponder.rewards.scorer import Scorer, UnboundScorer, model_scorer
from ponder.rewards.text_reward import TextReward

__all__ = ["ProcessReward", "ProcessRewardPotential", "ProcessRewardState", "process_reward"]


class ProcessRewardState(NamedTuple):
    """What was read and judged of N traces.

    Attributes:
        cache: the scorer's: the PRM's cache after the judged units.
        judgements: of the judged units.
        pending: int32[N, C]; tokens of the present unit, not judged yet.
        num_pending: int32[N]; how many there are; above C if some were lost, and Φ is then NaN.
        blank: int32[N]; whether they have visible text, see `Blanks`; None where that does not matter.
    """

    cache: Any
    judgements: Judgements
    pending: jax.Array
    num_pending: jax.Array
    blank: jax.Array | None


class _Reading(NamedTuple):
    """The scorer's cache after a unit, `scores` float32[N], and which rows were `judged` bool[N]."""

    cache: Any
    scores: jax.Array
    judged: jax.Array


def _nothing(cache: Any, lengths: jax.Array) -> _Reading:
    return _Reading(cache, jnp.zeros(lengths.shape, jnp.float32), jnp.zeros(lengths.shape, bool))


@pytree
class ProcessReward(Unbound):
    """What `process_reward` returns.

    Attributes:
        scorer: the PRM with its prompt, or a `ponder.text_reward`.
        likelihood: from scores to log Φ.
    """

    scorer: UnboundScorer
    likelihood: Likelihood

    def bind(self, context: Context) -> ProcessRewardPotential:
        """Fit the scorer to the program's tokens, prompts and limits.

        Raises:
            TypeError, ValueError: the scorer cannot read the program's traces; see `process_reward`.
        """
        return ProcessRewardPotential(
            self.scorer.bind(context),
            self.likelihood,
            compile_blanks(context),
            eos_token_ids=tuple(int(token) for token in context.lm.eos_token_ids),
            unit_tokens=min(context.max_unit_tokens or context.max_new_tokens, context.max_new_tokens),
        )

    def __repr__(self) -> str:
        return f"process_reward(link={self.likelihood.link!r}, aggregate={self.likelihood.aggregate!r})"


@pytree
class ProcessRewardPotential(Bound):
    """The likelihood of a scorer's judgements, for one program.

    Attributes:
        scorer: reads units and scores them.
        likelihood: from scores to log Φ.
        blanks: tells units that are no steps; None where every unit is one.
        eos_token_ids: tokens that end a trace and are no part of its text.
        unit_tokens: C, the most tokens of a unit.
    """

    scorer: Scorer
    likelihood: Likelihood
    blanks: Blanks | None
    eos_token_ids: tuple[int, ...] = static()
    unit_tokens: int = static()

    @property
    def num_reward_models(self) -> int:
        """One."""
        return 1

    @property
    def of_text(self) -> bool:
        """Whether the scorer's are."""
        return self.scorer.of_text

    @property
    def unbound(self) -> ProcessReward:
        """What it was made of."""
        return ProcessReward(self.scorer.unbound, self.likelihood)

    def init(self, num_particles: int) -> ProcessRewardState:
        """See `Potential`."""
        return ProcessRewardState(
            cache=self.scorer.start(num_particles),
            judgements=self.likelihood.init(num_particles),
            pending=jnp.zeros((num_particles, self.unit_tokens), jnp.int32),
            num_pending=jnp.zeros(num_particles, jnp.int32),
            blank=None if self.blanks is None else self.blanks.init(num_particles),
        )

    def update(self, state: ProcessRewardState, tokens: jax.Array, active: jax.Array) -> ProcessRewardState:
        """Keep tokens other than EOS until their unit ends."""
        eos = jnp.asarray(self.eos_token_ids, jnp.int32)
        reads = active & ~(tokens[:, None] == eos[None, :]).any(1)
        width = state.pending.shape[1]
        column = jnp.where(reads, state.num_pending, width)  # past the end: not written
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        pending = state.pending.at[rows, column].set(tokens.astype(jnp.int32), mode="drop")
        num_pending = state.num_pending + reads.astype(jnp.int32)
        blank = state.blank
        if self.blanks is not None and blank is not None:
            blank = jnp.where(reads, self.blanks.advance(blank, tokens), blank)
        return state._replace(pending=pending, num_pending=num_pending, blank=blank)

    def commit(self, state: ProcessRewardState, rows: jax.Array) -> ProcessRewardState:
        """Judge the units that have ended in some rows; those without visible text are not judged."""
        lengths = jnp.where(rows, state.num_pending, 0)

        def read(_: Any, carry: _Reading) -> _Reading:
            return self._read(carry.cache, state._replace(num_pending=lengths))

        nothing = _nothing(state.cache, lengths)
        if isinstance(lengths, Tracer):
            # A loop of no or one trip, whose carry XLA updates in place: no unit, no call.
            found = jax.lax.fori_loop(0, jnp.where((lengths > 0).any(), 1, 0), read, nothing)
        else:  # outside jit every loop would be compiled anew
            found = read(0, nothing) if (lengths > 0).any() else nothing
        blank = state.blank
        if self.blanks is not None and blank is not None:
            blank = jnp.where(rows, self.blanks.init(rows.shape[0]), blank)
        return state._replace(
            cache=found.cache,
            judgements=self.likelihood.absorb(state.judgements, found.scores, found.judged),
            num_pending=jnp.where(rows, 0, state.num_pending),
            blank=blank,
        )

    def log_prefix(self, state: ProcessRewardState) -> jax.Array:
        """Log Φ, with the tokens since the last `commit` as one more unit; that judgement is not kept."""

        def read(state: ProcessRewardState) -> _Reading:
            return self._read(state.cache, state)._replace(cache=None)

        def skip(state: ProcessRewardState) -> _Reading:
            return _nothing(None, state.num_pending)

        some = (state.num_pending > 0).any()
        if isinstance(some, Tracer):
            found = jax.lax.cond(some, read, skip, state)
        else:
            found = read(state) if some else skip(state)
        return self.likelihood.absorb(state.judgements, found.scores, found.judged).log_value

    def log_complete(self, state: ProcessRewardState) -> jax.Array:
        """See `log_prefix`."""
        return self.log_prefix(state)

    def judge(self, state: ProcessRewardState, ends: jax.Array) -> jax.Array:
        """Log Φ of the units that were committed; what came since does not count.

        Programs commit a unit before they weigh it. The one look without that is at candidates, to see if
        Φ can be positive, and it always is. So the PRM has one pass a unit, and is compiled once.
        """
        return state.judgements.log_value

    def judge_prefix(self, state: ProcessRewardState, rows: jax.Array) -> jax.Array:
        """See `judge`."""
        return self.judge(state, rows)

    def fork(self, state: ProcessRewardState, ancestors: jax.Array) -> ProcessRewardState:
        """See `Potential`."""
        rows = jax.tree.map(lambda x: x[ancestors], state._replace(cache=None))
        return rows._replace(cache=self.scorer.fork(state.cache, ancestors))

    def _read(self, cache: Any, state: ProcessRewardState) -> _Reading:
        """Let the scorer read the pending units; `cache` is the scorer's."""
        width, lengths = state.pending.shape[1], state.num_pending
        visible = jnp.ones(lengths.shape, bool)
        if self.blanks is not None and state.blank is not None:
            visible = ~self.blanks.is_blank(state.blank)
        tokens = jnp.minimum(lengths, width)
        cache, scores, judged = self.scorer.read(cache, state.pending, tokens, visible)
        # Lost tokens: nobody committed in time. A wrong answer must not look like a right one.
        return _Reading(cache, jnp.where(lengths > width, jnp.nan, scores), judged)


def process_reward(
    prm: RewardModel | TextReward,
    *,
    link: str = "bernoulli",
    aggregate: str = "last",
    calibration: Callable[[jax.Array], jax.Array] | None = None,
    scale: Any = 1.0,
    offset: Any = 0.0,
    prompt: str | Sequence[Any] | np.ndarray | jax.Array | None = None,
    improper: bool = False,
    max_step_tokens: int | None = None,
) -> ProcessReward:
    r"""Make evidence of a process reward model's judgements.

    After each unit of generation (a token, or with `ponder.Step` a step of reasoning) the PRM gives a score
    s_t for the trace so far. The judgement r_t is made of s_1 ... s_t in this order: they are aggregated;
    `calibration` maps the aggregate to a probability; and r_t = sigmoid(scale · logit(·) + offset). With t
    units judged, the target is π(x) ∝ p(x | prompt) Φ_t(x), where

    - "bernoulli": Φ_t = r_1 r_2 ... r_t, every step was judged right;
    - "odds": Φ_t = Π_{s≤t} r_s / (1 - r_s), the weight in effect of the published particle filters;
    - "ratio": Φ_t = r_t, the last judgement alone: earlier ones only guide the search;
    - "exp": Φ_t = exp(scale · r_t), where `scale` is β and does not act on the logit: a tempering device.

    The products of "bernoulli" and "odds" run over the judgements r_s after each unit, each an aggregate of
    all scores up to s: with aggregate="prod", say, the first score enters every factor. They count units, so
    long traces weigh less than short ones under "bernoulli".

    Φ of a trace without text is 1: EOS is not text, and a unit of EOS alone is not judged anew. A step of
    nothing but blanks and its delimiter (without text, of nothing but its delimiter) is no step either: it
    is not judged and earns nothing. With unit="token" every token is judged. Scores, calibrated ones too, are
    clipped to [2^-24, 1 - 2^-24]; a product of scores may be smaller than that unless it is calibrated.

    The PRM reads each unit when it ends, from its own cache: a step costs its own tokens. A PRM that states
    a form (`ponder.models.StepForm`), as those of published layouts do, is shown the steps in it, and the
    prompt too: the trace keeps its delimiters and empty lines, the PRM does not see them. For that the step's
    text is decoded and encoded anew on the host, and so it is where the tokenizers differ; Φ is then a
    function of the text, however it is cut into tokens (but for tokens that have visible text beyond a
    delimiter: it belongs to the step that they end). Any other PRM of the program's own tokenizer reads
    its ids as they are, but for empty steps.

    Args:
        prm: a reward model (`ponder.models.load_reward`), or `ponder.text_reward`.
        link: "bernoulli", "odds", "ratio" or "exp".
        aggregate: of the scores s_1 ... s_t: "last", "min", "prod" or "mean".
        calibration: a monotone map of arrays in (0, 1), see `ponder.calibration`.
        scale: > 0; may be a traced scalar, such as a latent variable.
        offset: finite; may be a traced scalar. Of no use to the link "exp".
        prompt: what the PRM reads before the trace: text, chat messages, or its token ids; or a list of one
            for each of the program's prompts. None: the program's prompt, the same ids where the tokenizers
            are the same, else the text or the chat encoded by the PRM's own tokenizer and template.
        improper: allow the link "exp" with a traced scale. Its Φ is not normalised over anything observed, so
            that a latent β has no likelihood, and its posterior may be improper. A latent β that reaches
            this function as a concrete number cannot be told apart from a constant, and is not refused.
        max_step_tokens: the most tokens of the PRM that a unit may have, where its text is encoded anew.
            None: 2 C + 16 for units of at most C tokens, and 2 T + 16 for a whole trace (C and T in place of
            2 C and 2 T where the tokenizers are the same), and what the PRM's form puts between steps. A step
            that does not fit is an error while the program runs, never cut.

    Raises:
        TypeError: `prm` is neither a reward model nor a text reward, or `calibration`, `scale`, `offset`,
            `prompt` or `improper` is of the wrong kind. When the program is built: a PRM that has no
            `extend_block` and a cache whose rows cannot be held, or no `prefill_many` for several prompts.
        ValueError: `link` or `aggregate` is not one of those above, `scale` is not positive, `offset` is not
            finite or comes with the link "exp", a traced `scale` comes with that link, or `max_step_tokens`
            is below 1 or comes with a text reward. When the program is built: vocabularies that differ
            without tokenizers to translate, or a text beyond the PRM's context.

    Example:
        >>> import ponder
        >>> prm = ponder.text_reward(lambda prompt, texts: [0.9 if "4" in text else 0.2 for text in texts])
        >>> ponder.process_reward(prm, link="odds", aggregate="min")
        process_reward(link='odds', aggregate='min')
    """
    for name, value, known in (("link", link, LINKS), ("aggregate", aggregate, AGGREGATES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    if calibration is not None and (isinstance(calibration, type) or not callable(calibration)):
        raise TypeError(f"calibration: expected a map of arrays, see ponder.calibration; got {calibration!r}")
    if not isinstance(improper, bool | np.bool_):
        raise TypeError(f"improper: expected a bool, got {improper!r}")
    likelihood = Likelihood(_scalar("scale", scale), _scalar("offset", offset), calibration, link, aggregate)
    if not isinstance(scale, Tracer) and not float(scale) > 0:
        raise ValueError(f"scale: expected a number > 0, got {scale!r}")
    if link == "exp":
        if isinstance(offset, Tracer) or float(offset) != 0:
            raise ValueError(
                f"offset: the link 'exp' has none, since exp(scale · r) has no logit; got {offset!r}"
            )
        if isinstance(scale, Tracer) and not improper:
            raise ValueError(
                "scale: a latent scale with link='exp' has no likelihood: exp(scale · r) is not normalised, "
                "and its posterior may be improper. Use link='bernoulli', or pass improper=True if you must"
            )
    if isinstance(prm, TextReward):
        if max_step_tokens is not None:
            raise ValueError("max_step_tokens: a text_reward reads text, not tokens; expected None")
        return ProcessReward(prm if prompt is None else prm.with_prompt(prompt), likelihood)
    return ProcessReward(model_scorer(prm, prompt, max_step_tokens), likelihood)


def _scalar(name: str, value: Any) -> jax.Array:
    """Return a finite or traced real scalar as float32."""
    real = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
    dtype = getattr(value, "dtype", jnp.float32)
    real = real and (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))
    if not real or np.shape(value) != ():
        raise TypeError(f"{name}: expected a real scalar, got {value!r}")
    if not isinstance(value, Tracer) and not abs(float(value)) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return jnp.asarray(value, jnp.float32)
