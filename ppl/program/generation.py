"""A language model, a prompt and a potential as one state-space model: the program that kernels run.

The target is π(x) ∝ p(x | prompt) Φ(x) over traces x that end with an EOS token, with a stop string, or at
`max_new_tokens`; the evidence is Z = Σ_x p(x | prompt) Φ(x). Neither the proposal nor the potentials of
unfinished prefixes change it. Several prompts are as many independent inferences, run side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_pytree_node_class

from ponder.arguments import check_count, check_flag, lacking
from ponder.bases import BaseProgram, UnboundPotential
from ponder.models.protocols import LanguageModel
from ponder.models.rows import fork_rows
from ponder.program.per_prompt import bind_potential
from ponder.program.prompt_forms import plain
from ponder.program.prompts import Prompt, describe_prompts, encode_prompts, pad_prompts, read_prompts
from ponder.program.proposing import propose
from ponder.program.ragged import check_ragged, ragged_cache
from ponder.program.sampling import PriorSettings
from ponder.program.state import GenerationState, Proposal
from ponder.program.step import CompiledStep, Step, compile_step
from ponder.program.step_move import propagate_step
from ponder.program.stop import StopAutomaton, compile_stop, sort_stops
from ponder.program.weighing import log_increment, weigh
from ponder.protocols import Context, Move, Potential, Traces

__all__ = ["Generation"]


@register_pytree_node_class
class Generation(BaseProgram):
    """Generation from a language model under evidence; see the module for its target.

    Args:
        lm: the language model.
        prompt: text (encoded as it stands, after BOS where the tokenizer adds one), chat messages
            (`[{"role": ..., "content": ...}]`, rendered by the chat template; content may be a list of parts
            of text, and a last message of the assistant is not closed: the trace goes on from it), or token
            ids. A list of such prompts, or an array of strings, is a batch: each has its own particles,
            evidence and posterior, and kernels return a list.
        max_new_tokens: T >= 1, the most tokens a trace may have, EOS included.
        potential: evidence; None means Φ = 1. With several prompts, one for all or a list of one for each.
        proposal: None draws from q ∝ p · exp(token_logits) where the potential offers `token_logits` (the
            locally optimal proposal) and from p elsewhere; a function gives log q, see `Proposal`. q must
            be positive wherever p · Φ is. "rejection" draws from the same q restricted to the tokens after
            which Φ > 0, by adaptive weighted rejection (`ponder.program.rejection`): for hard
            constraints that have no `token_logits`, such as `ponder.text` with a `prefix`; it checks a few
            candidates a step instead of the vocabulary, and the weights stay exact.
        temperature: of the prior, with top_k, top_p and min_p, as in Hugging Face `generate`.
        top_k: see `ponder.program.sampling.PriorSettings`.
        top_p: see there.
        min_p: see there.
        unit: "token", or a `ponder.Step`: particles are weighed and resampled a step of reasoning at a time.
            It changes neither the target nor the evidence, unless it limits the number of steps or a
            potential counts units, as `process_reward` does.
        stop: strings and token ids that end a trace.
        include_stop: whether the texts of a posterior keep the stop that ended them, and what its token has
            beyond it. False cuts that off, as most servers do: in `Posterior.text`, answers, tables, saved
            files, wherever text is shown. Tokens keep it, and so does the text that potentials judge.
        overflow: "truncate": a trace cut at `max_new_tokens` is complete as it is. "force_eos": its last
            token must be EOS (or end a stop string) and is weighted with p(EOS), so that the target is p
            conditioned to end in time, and the evidence includes the probability that it does.
        chat_template_kwargs: variables for the chat template, such as `{"enable_thinking": False}` or
            `{"tools": [...]}`.

    Raises:
        TypeError: `lm`, `prompt`, `potential`, `proposal`, `unit`, `stop` or `include_stop` is of the wrong
            kind, or `lm` lacks what several prompts or a step unit need.
        ValueError: a number is out of range; `prompt` is empty, too long for the context of `lm`, or has ids
            outside its vocabulary; `stop` or `unit` cannot be found in its tokens; a list of potentials is
            not as long as that of the prompts; `potential` cannot be bound, as a regular expression that no
            text of `max_new_tokens` matches; or `overflow` is "force_eos" where nothing ends a trace. All of
            these come before any compilation.
    """

    tells_traces = True

    def __init__(
        self,
        lm: LanguageModel,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int,
        potential: Potential | UnboundPotential | Sequence[Potential | UnboundPotential] | None = None,
        proposal: Proposal | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        unit: str | Step = "token",
        stop: str | int | Sequence[str | int] = (),
        include_stop: bool = True,
        overflow: str = "truncate",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        if isinstance(lm, type) or not isinstance(lm, LanguageModel):
            raise TypeError(
                "lm: expected a LanguageModel (see ponder.models.load), " + lacking(lm, LanguageModel)
            )
        max_new_tokens = check_count("max_new_tokens", max_new_tokens, 1)
        if proposal is not None and proposal != "rejection" and not callable(proposal):
            raise TypeError(f"proposal: expected a function, 'rejection' or None, got {proposal!r}")
        if overflow not in ("truncate", "force_eos"):
            raise ValueError(f"overflow: expected 'truncate' or 'force_eos', got {overflow!r}")
        wrong = [i for i in lm.eos_token_ids if not 0 <= i < lm.vocab_size]
        if wrong:
            raise ValueError(f"lm: eos_token_ids {wrong} are outside its vocabulary of {lm.vocab_size}")
        self.lm = lm
        self.max_new_tokens = max_new_tokens
        self.settings = PriorSettings(temperature, top_k, top_p, min_p)
        self.overflow = overflow
        prompts, is_batch = encode_prompts(lm, prompt, self.max_new_tokens, chat_template_kwargs)
        self.num_prompts = len(prompts) if is_batch else None
        self.prompt, self.prompt_length = pad_prompts(lm, prompts)
        stop = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str | bytes) else stop
        self.stop: StopAutomaton | None = compile_stop(stop, lm)
        strings, ids = sort_stops(stop, lm.vocab_size, "stop")
        self.cut = () if check_flag("include_stop", include_stop) else (*strings, *ids)
        self.unit: CompiledStep | None = compile_step(unit, lm, self.max_new_tokens)
        if self.unit is not None:
            check_ragged(lm, "lm")
        if overflow == "force_eos" and not lm.eos_token_ids and self.stop is None:
            raise ValueError("overflow: 'force_eos' needs a model with EOS tokens or a stop string")
        # Where the last token has to be EOS, the text has one token fewer; a stop string may use them all.
        room = self.max_new_tokens - (overflow == "force_eos" and self.stop is None)
        context = Context(
            lm,
            room,
            prompts,
            sources=tuple(map(plain, prompt)) if is_batch else (plain(prompt),),  # pyright: ignore[reportArgumentType]
            max_units=self.num_steps,
            max_unit_tokens=self._max_unit_tokens(),
            delimiters=() if self.unit is None else self.unit.delimiters,
        )
        self.potential = bind_potential(potential, context, self.num_prompts)
        self.proposal: Proposal | None = proposal

    def _max_unit_tokens(self) -> int:
        """Most tokens of a unit's text."""
        if self.unit is None:
            return 1
        # A trace that must end may have one token more after its last step: of a stop string; EOS is no text.
        more = self.overflow == "force_eos" and self.stop is not None
        return min(self.unit.max_tokens + more, self.max_new_tokens)

    def __repr__(self) -> str:
        return (
            f"Generation({self.lm!r}, {describe_prompts(self.num_prompts, self.prompt_length)}, "
            f"max_new_tokens={self.max_new_tokens}, potential={type(self.potential).__name__}, "
            f"overflow={self.overflow!r})"
        )

    def tree_flatten(self):
        """Arrays and pytrees as children; settings as static data."""
        children = (self.lm, self.prompt, self.prompt_length, self.stop, self.unit, self.potential)
        return children, (
            self.num_prompts,
            self.max_new_tokens,
            self.settings,
            self.overflow,
            self.proposal,
            self.cut,
        )

    @classmethod
    def tree_unflatten(cls, aux, children):
        """Rebuild without validating: the children may be tracers."""
        self = object.__new__(cls)
        self.lm, self.prompt, self.prompt_length, self.stop, self.unit, self.potential = children
        self.num_prompts, self.max_new_tokens, self.settings, self.overflow, self.proposal, self.cut = aux
        return self

    @property
    def num_steps(self) -> int:
        """Units that finish every trace."""
        return self.max_new_tokens if self.unit is None else self.unit.max_steps

    @property
    def joins_pasts(self) -> bool:
        """Rejection estimates its normaliser with the past that it has."""
        return self.proposal != "rejection"

    @property
    def num_reward_models(self) -> int:
        """How many reward models judge each unit."""
        return 0 if self.potential is None else self.potential.num_reward_models

    @property
    def withholds(self) -> bool:
        """Whether the potential is (in part) a terminal score, which waits for all particles to end."""
        return self.potential is not None and self.potential.withholds

    @property
    def tokenizer(self):
        """The language model's."""
        return self.lm.tokenizer

    def init(self, key: jax.Array, num_particles: int) -> GenerationState:
        """Read the prompt and return `num_particles` empty traces of each; nothing is random."""
        del key
        n = num_particles * (self.num_prompts or 1)
        cache, logits = read_prompts(self.lm, self.prompt, self.prompt_length, n, self.max_new_tokens)
        if self.unit is not None:
            cache = ragged_cache(self.lm, cache, n)
        return GenerationState(
            cache=cache,
            logits=logits.astype(jnp.float32),
            tokens=jnp.full((n, self.max_new_tokens), self.padding, jnp.int32),
            lengths=jnp.zeros(n, jnp.int32),
            done=jnp.zeros(n, bool),
            stop=None if self.stop is None else self.stop.init(n),
            potential=None if self.potential is None else self.potential.init(n),
            log_potential=jnp.zeros(n, jnp.float32),
            withheld=None,
            log_prior=jnp.zeros(n, jnp.float32),
            step=jnp.int32(0),
        )

    def propagate(
        self, key: jax.Array, state: GenerationState, forced: tuple[jax.Array, Move] | None = None
    ) -> tuple[GenerationState, Move, jax.Array]:
        """Draw one unit a particle, weigh it and read it; see `StateSpaceModel.propagate`."""
        if self.unit is not None:
            return propagate_step(self, self.unit, key, state, forced)
        active = ~state.done
        last = state.lengths == self.max_new_tokens - 1
        replay = None if forced is None else (forced[0], forced[1].tokens, forced[1].log_proposal)
        drawn = propose(self, key, state, active, last, replay)
        judged = weigh(self.potential, drawn.potential, active, drawn.ends, withheld=state.withheld)
        log_weight = log_increment(
            drawn.log_p, drawn.log_q, drawn.stuck, state.log_potential, judged.log_potential
        )

        # Read, unless every trace is finished: a loop of no or one trip, whose carry XLA updates in place.
        def read(_: Any, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            cache, logits = self.lm.extend(carry[0], drawn.tokens)
            return cache, logits.astype(jnp.float32)

        trips = jnp.where((active & ~drawn.ends).any(), 1, 0)
        cache, logits = jax.lax.fori_loop(0, trips, read, (state.cache, state.logits))
        state = state._replace(
            cache=cache,
            logits=logits,
            tokens=jax.lax.dynamic_update_slice_in_dim(
                state.tokens, drawn.tokens[:, None], state.step, axis=1
            ),
            lengths=state.lengths + active.astype(jnp.int32),
            done=state.done | drawn.ends,
            stop=drawn.stop,
            potential=judged.potential,
            log_potential=jnp.where(active, judged.log_potential, state.log_potential),
            withheld=judged.withheld,
            log_prior=state.log_prior + drawn.log_p,
            step=state.step + 1,
        )
        move = Move(drawn.tokens, drawn.log_q, active.astype(jnp.int32))
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

    def withhold(self, state: GenerationState) -> GenerationState:
        """Keep terminal scores apart from now on; see `BaseProgram`."""
        return state._replace(withheld=jnp.zeros_like(state.log_potential)) if self.withholds else state

    def settle(self, state: GenerationState, rows: jax.Array) -> tuple[GenerationState, jax.Array]:
        """Add to log Φ of some rows the terminal score that was withheld; return it, float32[N]."""
        if state.withheld is None:
            return state, jnp.zeros(rows.shape, jnp.float32)
        score = jnp.where(rows, state.withheld, 0.0)
        return state._replace(
            log_potential=state.log_potential + score,
            withheld=jnp.where(rows, 0.0, state.withheld),
        ), score

    def traces(self, state: GenerationState) -> Traces:
        """Return what the particles say, and log p and log Φ of it."""
        log_potential = state.log_potential
        if state.withheld is not None:
            log_potential = log_potential + state.withheld
        return Traces(state.tokens, state.lengths, state.log_prior, log_potential)

    @property
    def padding(self) -> int:
        """What stands in `tokens` beyond the end of a trace."""
        return self.lm.eos_token_ids[0] if self.lm.eos_token_ids else 0
