"""Checks that users can run on their own potentials and kernels; each raises AssertionError naming the law.

Statistical checks compare the mean of k independent runs with the exact value by
z = (mean - exact) / (standard deviation / √k) and fail at |z| >= 5: for one comparison a false alarm once in
about two million, with the key fixed by the caller.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.bases import BasePotential, UnboundPotential
from ponder.enumeration import enumerate_traces
from ponder.foreign import as_evidence, as_potential
from ponder.host.errors import reraised
from ponder.models.protocols import LanguageModel
from ponder.posterior.posterior import Posterior
from ponder.potentials.combining import Product
from ponder.program.generation import Generation
from ponder.program.step import Step
from ponder.protocols import Context, Potential
from ponder.tokenisations import check_texts, is_of_text

__all__ = ["MAX_Z", "AlgorithmReport", "check_algorithm", "check_potential", "z_scores"]

MAX_Z = 5.0
"""Largest |z| that a statistical check lets pass; two-sided false-alarm rate 5.7e-7 a comparison."""


def z_scores(samples: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Return z of the mean over the first axis; for samples that do not vary, 0 if right, else inf."""
    samples = np.asarray(samples, np.float64)
    error = samples.mean(axis=0) - exact
    spread = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    # Below this the estimates differ by float32 rounding alone, which no number of runs averages out.
    floor = 1e-5 * np.maximum(np.abs(exact), 1e-12)
    constant = spread <= floor
    return np.where(
        constant, np.where(np.abs(error) <= 10 * floor, 0.0, np.inf), error / np.where(constant, 1, spread)
    )


MIN_EXPECTED = 100
"""Expected number of runs in which a group of traces is drawn."""


class AlgorithmReport(NamedTuple):
    """What `check_algorithm` compared.

    Attributes:
        exact_log_evidence: by enumeration.
        evidence_z: z of the evidence estimate, on the linear scale.
        group_z: float[G]; z of the unnormalised mass of each group of traces; a probable trace is a group.
    """

    exact_log_evidence: float
    evidence_z: float
    group_z: np.ndarray


@reraised()
def check_algorithm(
    algorithm: Any, program: Generation, *, key: jax.Array | None = None, num_runs: int = 2000
) -> AlgorithmReport:
    """Compare a kernel with exact enumeration of its program.

    Over independent runs, E[Ẑ] must be Z, and for every trace E[Ẑ · its share of the weight] must be
    p(x) Φ(x): together, proper weighting. Rare traces are pooled, so that means are close to normal.

    Args:
        algorithm: its `run(key)` must be traceable and give a `Posterior` with evidence.
        program: what the algorithm was built on; small enough to enumerate.
        key: of the runs; `jax.random.key(0)` by default.
        num_runs: independent runs, at least 1000; as many pilot runs are made to pool the rare traces.

    Raises:
        AssertionError: an estimate is off by |z| >= 5, or a run returned NaN or weights that do not sum to 1.
        ValueError: the program cannot be enumerated, or `num_runs` is too small for a z-score.
    """
    if num_runs < 1000:
        raise ValueError(f"num_runs: expected at least 1000, got {num_runs}")
    traces = enumerate_traces(program)
    joint = np.exp(traces.log_prior.astype(np.float64) + traces.log_potential)
    codes = jnp.asarray(_code(traces.tokens, traces.lengths))

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        posterior: Posterior = algorithm.run(key)
        same = (_code(posterior.tokens, posterior.lengths)[:, None, :] == codes[None]).all(-1)
        shares = jnp.where(same, jnp.exp(posterior.log_weights)[:, None], 0.0).sum(0)
        return posterior.log_evidence, shares, jax.nn.logsumexp(posterior.log_weights)

    # Pilot runs say how often each trace is drawn; the check itself is on fresh ones.
    key_pilot, key_check = jax.random.split(jax.random.key(0) if key is None else key)
    runs = jax.jit(lambda keys: jax.lax.map(one, keys))  # one by one: the kernel as it runs alone
    drawn = np.asarray(runs(jax.random.split(key_pilot, num_runs))[1]) > 0
    group = _groups(drawn.mean(axis=0), least=MIN_EXPECTED / num_runs)
    log_evidence, shares, totals = map(np.asarray, runs(jax.random.split(key_check, num_runs)))
    assert not np.isnan(log_evidence).any(), "log_evidence is NaN: this algorithm gives no evidence to check"
    assert np.allclose(totals, 0.0, atol=1e-4), f"log_weights: logsumexp is {totals.min()} ... {totals.max()}"

    evidence = np.exp(log_evidence.astype(np.float64))
    evidence_z = float(z_scores(evidence[:, None], np.array([joint.sum()]))[0])
    assert abs(evidence_z) < MAX_Z, (
        f"evidence: the mean over {num_runs} runs is {evidence.mean():.6g}, exact {joint.sum():.6g}, "
        f"z = {evidence_z:.1f}"
    )
    members = np.eye(group.max() + 1)[group]
    masses, exact = evidence[:, None] * (shares @ members), np.bincount(group, joint)
    group_z = z_scores(masses, exact)
    worst = int(np.abs(group_z).argmax())
    assert abs(group_z[worst]) < MAX_Z, (
        f"posterior: the mean mass of traces {np.flatnonzero(group == worst)[:8]} is "
        f"{masses[:, worst].mean():.6g}, exact {exact[worst]:.6g}, z = {group_z[worst]:.1f}; "
        "the weights are not proper for p(x) Φ(x)"
    )
    return AlgorithmReport(float(np.log(joint.sum())), evidence_z, group_z)


def _groups(frequency: np.ndarray, least: float) -> np.ndarray:
    """Group number of each trace, such that each group is drawn in a share of `least` of the runs or more.

    Rare traces share a group: the mean over few draws of a large weight is not close to normal.
    """
    group = np.empty(len(frequency), int)
    number, held = 0, 0.0
    for trace in np.argsort(-frequency):
        group[trace] = number
        held += frequency[trace]
        if held >= least:
            number, held = number + 1, 0.0
    return np.minimum(group, max(number - 1, 0))  # what is left over joins the last full group


def _code(tokens: Any, lengths: Any) -> Any:
    """Tokens with a mark beyond the length, so that equal rows mean equal traces."""
    return jnp.where(
        jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < jnp.asarray(lengths)[:, None], tokens, -1
    )


@reraised()
def check_potential(
    potential: Potential | UnboundPotential,
    lm: LanguageModel,
    *,
    key: jax.Array | None = None,
    num_particles: int = 6,
    num_steps: int = 6,
    num_tokens: int = 8,
    atol: float = 1e-4,
    unit: str | Step = "token",
) -> None:
    """Check the laws of `Potential` along random traces of a model.

    1. `log_prefix` and `log_complete` are float[N], without NaN or +inf, under jit as without.
    2. A prefix of weight zero stays at zero, and so does every completion of it.
    3. Rows that are not active do not change.
    4. `token_logits[v]` is log Φ(x·v) - log Φ(x), EOS by the complete rule; `complete_logits` likewise.
    5. `fork` commutes with `update`.
    6. Rows do not see each other: a row alone gives what it gives in a batch.
    7. Of a potential whose attribute `of_text` is true, a text has one `log_complete` however it is cut into
       tokens, empty steps or not. (A token that goes on with visible text beyond a delimiter moves the end of
       a step, and makes other steps.)

    Args:
        potential: what to check; it is bound to `lm` first. The factors of a product are also checked alone.
        lm: supplies the vocabulary and the traces (sampled from it, tempered to be more varied).
        key: `jax.random.key(0)` by default.
        num_particles: rows of the batch, at least 2.
        num_steps: length of the traces.
        num_tokens: next tokens tried at each step, besides EOS; drawn anew each step.
        atol: largest difference of log values that counts as equal.
        unit: what the program's unit will be, for law 7; with "token", the whole text is one unit there.

    Raises:
        AssertionError: a law does not hold; the message names it and the step.
        TypeError: `potential` lacks a method of `Potential`.
        ValueError: `num_particles` is below 2, or the potential cannot be bound to `lm`.
    """
    if num_particles < 2:
        raise ValueError(f"num_particles: expected at least 2, got {num_particles}")
    bound = as_potential(as_evidence(potential).bind(Context(lm, num_steps + 1, ((0,),))))
    walk = _Walk(bound, lm, num_particles, num_tokens, atol)
    key = jax.random.key(0) if key is None else key
    walk.run(key, num_steps)
    if any(map(is_of_text, bound.potentials if isinstance(bound, Product) else (bound,))):
        check_texts(potential, lm, unit, key, num_texts=num_particles, num_pieces=num_steps, atol=atol)


class _Walk(NamedTuple):
    """The checks of `check_potential` along traces."""

    potential: BasePotential
    lm: LanguageModel
    num_particles: int
    num_tokens: int
    atol: float

    def run(self, key: jax.Array, num_steps: int) -> None:
        """Check the laws at every step; of a product, those of its factors first."""
        potential, lm, n = self.potential, self.lm, self.num_particles
        for factor in potential.potentials if isinstance(potential, Product) else ():
            self._replace(potential=factor).run(key, num_steps)
        cache, logits = lm.prefill(jnp.zeros(1, jnp.int32), n, num_steps + 1)
        state = potential.init(n)
        eos = jnp.asarray(lm.eos_token_ids, jnp.int32)
        for step in range(num_steps):
            key_step = jax.random.fold_in(key, step)
            # EOS only comes from the tokens that are tried: a trace that ends is not extended.
            prior = jax.nn.log_softmax(0.5 * logits.at[:, eos].set(-jnp.inf))
            state = self.check(key_step, state, prior, step)
            guide = potential.token_logits(state)
            draw_from = prior if guide is None else prior + guide
            alive = (draw_from > -jnp.inf).any(-1, keepdims=True)
            tokens = jax.random.categorical(key_step, jnp.where(alive, draw_from, prior)).astype(jnp.int32)
            before = potential.log_prefix(state)
            state = potential.update(state, tokens, jnp.ones(n, bool))
            after = potential.log_prefix(state)
            assert not ((before == -jnp.inf) & (after > -jnp.inf)).any(), (
                f"step {step}: a prefix of weight zero got weight again; such traces would be lost"
            )
            cache, logits = lm.extend(cache, tokens)

    def check(self, key: jax.Array, state: Any, prior: jax.Array, step: int) -> Any:
        """Check the laws at one state; return the state that has observed the prior."""
        potential, n = self.potential, self.num_particles
        state = potential.observe(state, prior)
        everyone = jnp.ones(n, bool)
        key_tokens, key_fork, key_active = jax.random.split(key, 3)
        prefix, complete = self._values(state, step).T
        assert not ((prefix == -jnp.inf) & (complete > -jnp.inf)).any(), (
            f"step {step}: log_prefix is -inf where log_complete is not; such traces would be lost"
        )
        self._same(jax.jit(potential.log_prefix)(state), prefix, f"step {step}: log_prefix under jit")

        # Tokens: random ones for each row, and every EOS.
        random = jax.random.randint(key_tokens, (self.num_tokens, n), 0, self.lm.vocab_size, jnp.int32)
        columns = [*random, *(jnp.full(n, eos, jnp.int32) for eos in self.lm.eos_token_ids)]
        active = jax.random.bernoulli(key_active, 0.5, (n,))
        guide, completions = potential.token_logits(state), potential.complete_logits(state)
        if isinstance(potential, Product) and any(
            p.token_logits(s) is None for p, s in zip(potential.potentials, state, strict=True)
        ):
            guide = completions = None  # they are those of the other factors, which are checked alone
        for logits in (guide, completions):
            if logits is not None:
                shape = (n, self.lm.vocab_size)
                assert logits.shape == shape, f"step {step}: token logits {logits.shape}, expected {shape}"
        for tokens in columns:
            after = potential.update(state, tokens, everyone)
            is_eos = jnp.isin(tokens, jnp.asarray(self.lm.eos_token_ids, jnp.int32))
            full = potential.log_complete(after)
            value = jnp.where(is_eos, full, potential.log_prefix(after))
            comparable = prefix > -jnp.inf
            for name, logits, target in (
                ("token_logits", guide, value),
                ("complete_logits", completions, full),
            ):
                if logits is not None and (name == "token_logits" or not is_eos.any()):
                    found = jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0]
                    wanted = jnp.where(comparable, target - jnp.where(comparable, prefix, 0.0), 0.0)
                    self._same(jnp.where(comparable, found, 0.0), wanted, f"step {step}: {name}")
            # With EOS too: finished rows are padded with it.
            partly = self._values(potential.update(state, tokens, active), step)
            wanted = jnp.where(active[:, None], self._values(after, step), jnp.stack([prefix, complete], 1))
            self._same(partly, wanted, f"step {step}: update of rows that are not active")

        # Forks and batches.
        tokens = columns[0]
        fully = self._values(potential.update(state, tokens, everyone), step)
        ancestors = jax.random.randint(key_fork, (n,), 0, n, jnp.int32)
        forked = potential.update(potential.fork(state, ancestors), tokens[ancestors], everyone)
        self._same(self._values(forked, step), fully[ancestors], f"step {step}: fork, then update")
        row = jnp.zeros(n, jnp.int32)  # every slot holds row 0: its values must not depend on the others
        alone = potential.update(potential.fork(state, row), tokens[row], everyone)
        self._same(self._values(alone, step), fully[row], f"step {step}: row 0 without the other rows")
        return state

    def _values(self, state: Any, step: int) -> jax.Array:
        """Both values of a state, `[N, 2]`; they have to be numbers."""
        values = self.potential.log_prefix(state), self.potential.log_complete(state)
        n = self.num_particles
        for name, value in zip(("log_prefix", "log_complete"), values, strict=True):
            assert value.shape == (n,), f"step {step}: {name} has shape {value.shape}, expected {(n,)}"
            assert jnp.issubdtype(value.dtype, jnp.floating), f"step {step}: {name} has dtype {value.dtype}"
            bad = np.isnan(value) | (np.asarray(value) == np.inf)
            assert not bad.any(), f"step {step}: {name} is NaN or +inf in rows {np.nonzero(bad)[0]}"
        return jnp.stack(values, axis=1)

    def _same(self, found: jax.Array, wanted: jax.Array, what: str) -> None:
        equal = jnp.isclose(found, wanted, atol=self.atol, rtol=1e-5) | (found == wanted)
        assert equal.all(), f"{what}: got {np.asarray(found)}, expected {np.asarray(wanted)}"
