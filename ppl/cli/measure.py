"""What `ponder bench` measures, in one process: jobs on a model, and the matrix products they cannot avoid.

Run as a module it is the child of `ponder.cli.bench`: it takes a `Workload` as JSON and prints lines of JSON,
`{"stage": ...}` while it works and at last `{"result": ...}` or `{"error": ...}`. One process a workload,
because peak memory belongs to a process.

Machines are noisy and drift, so jobs and floors alternate, and ratios are taken between neighbours in time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import ponder
from ponder.cli.workload import BASELINE, JOBS, Job, Workload

__all__ = ["Floor", "Run", "measure", "summary"]

_TEXT = "The sea was calm that morning, and the boats lay still in the harbour while the fishermen slept. "
_PASSES = 4  # over all matrices, each time a floor is taken
_SLICES = 8  # of a run; the first holds the prompt


class Run(NamedTuple):
    """One run of a job.

    Attributes:
        seconds: of all of it.
        step_ms: milliseconds a step, without the prompt.
        prompt_ms: milliseconds until the first step.
        tokens: drawn by all particles.
        resamplings: steps that resampled.
    """

    seconds: float
    step_ms: float
    prompt_ms: float
    tokens: int
    resamplings: int


class Floor(NamedTuple):
    """Milliseconds of the matrix products of one step and nothing else.

    Attributes:
        left_ms: all products, independent of each other, with the weights on the left.
        right_ms: with the weights on the right.
        chain_ms: by the decoder's own `linear`, each product depending on the last, as in the model.
    """

    left_ms: float
    right_ms: float
    chain_ms: float


def measure(lm: Any, workload: Workload, report: Callable[[str], None]) -> dict[str, Any]:
    """Run the jobs of a workload on a loaded model; return what one entry of the JSON holds.

    Args:
        lm: a `DecoderLM` with a tokenizer; its EOS tokens are ignored, so that traces have full length.
        workload: what to run; `model` and `dtype` are not looked at.
        report: told of each stage.

    Raises:
        ValueError: the model has no tokenizer, or too short a context.
    """
    if lm.tokenizer is None:
        raise ValueError("model: it has no tokenizer, so it cannot read a prompt")
    lm = dataclasses.replace(lm, eos_token_ids=())
    tokens = lm.tokenizer.encode(_TEXT * (workload.prompt_tokens // 8 + 1))[: workload.prompt_tokens]
    algorithms = {name: _algorithm(JOBS[name], lm, tokens, workload) for name in workload.jobs}
    first = {}
    for name, algorithm in algorithms.items():
        report(f"compiling {name}")
        first[name] = _run(algorithm, seed=0)
    peak_memory_mb = _peak_memory_mb()  # before the floors add theirs
    report("compiling the matrix products")
    take_floor = _floor_timer(lm.decoder, workload.particles)
    take_floor()

    runs: dict[str, list[Run]] = {name: [] for name in algorithms}
    floors: dict[str, list[Floor]] = {name: [] for name in algorithms}
    for repeat in range(1, workload.repeats + 1):
        report(f"run {repeat} of {workload.repeats}")
        before = take_floor()
        for name, algorithm in algorithms.items():
            runs[name].append(_run(algorithm, seed=repeat))
            after = take_floor()
            floors[name].append(Floor(*(statistics.mean(pair) for pair in zip(before, after, strict=True))))
            before = after
    batch = {} if not workload.prompts else {"prompts": prompts_job(lm, tokens, workload, report)}
    weights = sum(matrix.size for matrix in _matrices(lm.decoder))
    return {
        "particles": workload.particles,
        "prompt_tokens": workload.prompt_tokens,
        "new_tokens": workload.new_tokens,
        "peak_memory_mb": peak_memory_mb,
        **summary(first, runs, floors, 2 * weights * workload.particles),
        **batch,
    }


def prompts_job(
    lm: Any, tokens: Sequence[int], workload: Workload, report: Callable[[str], None]
) -> dict[str, Any]:
    """Compare several prompts in one batch with the same ones run one after another, SMC at ESS 0.5."""
    # Prompts of equal length that differ: the same text, turned.
    prompts = [[*tokens[turn:], *tokens[:turn]] for turn in range(workload.prompts)]
    batch = _algorithm(JOBS["smc"], lm, prompts, workload)
    single = [_algorithm(JOBS["smc"], lm, prompt, workload) for prompt in prompts]

    def run_single(seed: int) -> tuple[int, float]:
        runs = [_run(algorithm, seed) for algorithm in single]
        return sum(run.tokens for run in runs), sum(run.seconds for run in runs)

    report(f"compiling {workload.prompts} prompts in one batch")
    _run(batch, seed=0)
    _run(single[0], seed=0)  # the others share its compilation
    rates = []
    for repeat in range(1, workload.repeats + 1):
        report(f"{workload.prompts} prompts, run {repeat} of {workload.repeats}")
        together = _run(batch, seed=repeat)
        one_by_one, seconds = run_single(repeat)
        rates.append((together.tokens / together.seconds, one_by_one / seconds))
    return {
        "prompts": workload.prompts,
        "tokens_per_second": statistics.median(rate for rate, _ in rates),
        "tokens_per_second_one_by_one": statistics.median(rate for _, rate in rates),
        "speedup": statistics.median(rate / alone for rate, alone in rates),
    }


def summary(
    first: dict[str, Run], runs: dict[str, list[Run]], floors: dict[str, list[Floor]], flop: int
) -> dict[str, Any]:
    """Reduce runs to medians, and to ratios between neighbours in time.

    Args:
        first: the run of each job that compiled it.
        runs: the steady runs of each job; those of equal position were made in the same round.
        floors: the floors around each steady run.
        flop: floating-point operations of one step's matrix products.
    """
    every = [floor for of_job in floors.values() for floor in of_job]
    left_ms, right_ms, chain_ms = (statistics.median(column) for column in zip(*every, strict=True))
    jobs = {}
    for name, of_job in runs.items():
        seconds = statistics.median(run.seconds for run in of_job)
        pairs = list(zip(of_job, floors[name], strict=True))
        jobs[name] = {
            "tokens_per_second": statistics.median(run.tokens / run.seconds for run in of_job),
            "ms_per_step": statistics.median(run.step_ms for run in of_job),
            "prompt_ms": statistics.median(run.prompt_ms for run in of_job),
            "compile_seconds": first[name].seconds - seconds,
            "share_of_gemm_floor": statistics.median(
                min(floor.left_ms, floor.right_ms) / run.step_ms for run, floor in pairs
            ),
            "share_of_gemm_chain": statistics.median(floor.chain_ms / run.step_ms for run, floor in pairs),
            "overhead_percent": None
            if name == BASELINE
            else statistics.median(
                100 * (run.step_ms / plain.step_ms - 1)
                for run, plain in zip(of_job, runs[BASELINE], strict=True)
            ),
            "resamplings": statistics.median(run.resamplings for run in of_job),
            "seconds": [run.seconds for run in of_job],
        }
    return {
        "gemm": {
            "flop_per_step": flop,
            "gflop_per_second": {
                "weights_left": 1e-6 * flop / left_ms,
                "weights_right": 1e-6 * flop / right_ms,
            },
            "floor_ms_per_step": min(left_ms, right_ms),
            "chain_ms_per_step": chain_ms,
        },
        "jobs": jobs,
    }


def _algorithm(job: Job, lm: Any, tokens: Any, workload: Workload) -> Any:
    program = ponder.Generation(
        lm,
        tokens,
        max_new_tokens=workload.new_tokens,
        potential=None if job.potential is None else job.potential(lm),
    )
    return ponder.inference.smc(program, workload.particles, ess_threshold=job.ess_threshold)


def _run(algorithm: Any, seed: int) -> Run:
    """Run once; the callbacks between slices are the stopwatch, as each comes after real work."""
    marks: list[tuple[int, float]] = []

    def mark(progress: Any) -> None:
        marks.append((progress.step, time.perf_counter()))

    every = max(1, algorithm.program.num_steps // _SLICES)
    start = time.perf_counter()
    posterior = algorithm.run(jax.random.key(seed), progress=mark, progress_every=every)
    jax.block_until_ready(posterior)
    seconds = time.perf_counter() - start
    (first_step, first_time), (last_step, last_time) = marks[0], marks[-1]
    step = (last_time - first_time) / (last_step - first_step)
    prompt = max(0.0, first_time - start - first_step * step)
    posteriors = posterior if isinstance(posterior, list) else [posterior]  # a list: one a prompt
    tokens = sum(int(of_prompt.stats.tokens_generated) for of_prompt in posteriors)
    resamplings = sum(int(of_prompt.stats.resampled.sum()) for of_prompt in posteriors)
    return Run(seconds, 1e3 * step, 1e3 * prompt, tokens, resamplings)


def _matrices(decoder: Any) -> list[Any]:
    """Parameters of the decoder that a step multiplies with, in the order of use."""
    matrices = [
        matrix for block in decoder.blocks for matrix in (block.qkv, block.o, block.gate_up, block.down)
    ]
    return [*matrices, decoder.embedding if decoder.head is None else decoder.head]


def _floor_timer(decoder: Any, rows: int) -> Callable[[], Floor]:
    """Compile the matrix products of one step for so many rows; return a function that times them."""
    from ponder.models.decoder import linear

    matrices = _matrices(decoder)
    arrays = [matrix[...] for matrix in matrices]
    widths = {array.shape[1] for array in arrays}
    inputs = {width: jnp.full((rows, width), 0.5, arrays[0].dtype) for width in widths}
    contract_last = (((1,), (1,)), ((), ()))

    @functools.partial(jax.jit, static_argnums=2)
    def independent(arrays, inputs, left):
        products = []
        for array in arrays:
            x = inputs[array.shape[1]]
            pair = (array, x) if left else (x, array)
            y = jax.lax.dot_general(*pair, contract_last, preferred_element_type=jnp.float32)
            # Without the barrier only what is returned would be computed.
            products.append(jax.lax.optimization_barrier(y)[0, 0])
        return jnp.stack(products)

    @jax.jit
    def chain(matrices, x):
        def once(_, x):
            for matrix in matrices:
                x = linear(_sized(x, matrix[...].shape[1]), matrix)
            return 1e-9 * _sized(x, arrays[0].shape[1])

        return jax.lax.fori_loop(0, _PASSES, once, x)

    start = jnp.ones((rows, arrays[0].shape[1]), jnp.float32)
    return lambda: Floor(
        _ms(lambda: [independent(arrays, inputs, True) for _ in range(_PASSES)]),
        _ms(lambda: [independent(arrays, inputs, False) for _ in range(_PASSES)]),
        _ms(lambda: chain(matrices, start)),
    )


def _sized(x: jax.Array, width: int) -> jax.Array:
    """Cut rows, or fill them up with zeros: a small vocabulary is narrower than the first input."""
    return jnp.pad(x, ((0, 0), (0, max(0, width - x.shape[1]))))[:, :width]


def _ms(passes: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(passes())
    return 1e3 * (time.perf_counter() - start) / _PASSES


def _peak_memory_mb() -> float | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def _child(argument: str) -> None:
    def tell(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    fields = json.loads(argument)
    workload = Workload(**{**fields, "jobs": tuple(fields["jobs"])})
    try:
        tell(stage="loading")
        start = time.perf_counter()
        lm = ponder.models.load(workload.model, dtype=workload.dtype)
        loaded = {"load_seconds": time.perf_counter() - start, "load_peak_memory_mb": _peak_memory_mb()}
        tell(result=loaded | measure(lm, workload, lambda stage: tell(stage=stage)))
    except (ValueError, TypeError, ImportError, NotImplementedError, OSError) as error:
        tell(error=str(error))


if __name__ == "__main__":
    _child(sys.argv[1])
