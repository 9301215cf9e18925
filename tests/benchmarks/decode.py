"""Measure particle decoding on the embedded model: tokens per second, compile time, memory, GEMM floor.

    python tests/benchmarks/decode.py --particles 32 --prompt 64 --new-tokens 64

Prints one JSON object. Compare ratios within one run: machines differ and are noisy. Never a test.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import time

import jax
import jax.numpy as jnp

import ponder
from ponder import inference
from ponder.models.decoder import linear

TEXT = "The sea was calm that morning, and the boats lay still in the harbour while the fishermen slept. "


class Noise(ponder.Composable):
    """A cheap potential that makes weights uneven, so that the ESS triggers resampling."""

    def init(self, num_particles):
        return jnp.zeros(num_particles)

    def update(self, state, tokens, active):
        return state + jnp.where(active, jnp.sin(1.7 * tokens), 0.0)

    def log_prefix(self, state):
        return state

    log_complete = log_prefix

    def token_logits(self, state):
        return None

    def fork(self, state, ancestors):
        return state[ancestors]


def measure(algorithm, repeats):
    """Return compile seconds (first run less a steady one) and the seconds of each steady run."""

    def once(seed):
        start = time.perf_counter()
        posterior = algorithm.run(jax.random.key(seed))
        posterior.log_evidence.block_until_ready()
        return time.perf_counter() - start, posterior

    first, _ = once(0)
    runs = [once(seed) for seed in range(1, repeats + 1)]
    seconds = [run[0] for run in runs]
    stats = runs[-1][1].stats
    tokens = int(stats.tokens_generated)
    return {
        "tokens_per_second": tokens / statistics.median(seconds),
        "ms_per_step": 1e3 * statistics.median(seconds) / int(stats.num_steps),
        "compile_seconds": first - statistics.median(seconds),
        "resamplings": int(stats.resampled.sum()),
        "seconds": seconds,
    }


def gemm_floor(lm, num_particles, repeats, steps=16):
    """Milliseconds a step of the same matrix products and nothing else, as a dependent chain."""

    def step(decoder, x):
        for block in decoder.blocks:
            qkv = linear(x, block.qkv)
            x = linear(qkv[:, : block.o[...].shape[1]], block.o)
            x = linear(linear(x, block.gate_up)[:, : block.down[...].shape[1]], block.down)
        head = decoder.embedding if decoder.head is None else decoder.head
        return 1e-9 * linear(x, head)[:, : x.shape[1]]

    run = jax.jit(lambda decoder, x: jax.lax.fori_loop(0, steps, lambda _, x: step(decoder, x), x))
    x = jnp.ones((num_particles, lm.decoder.config.hidden_size))
    run(lm.decoder, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(lm.decoder, x).block_until_ready()
        seconds.append((time.perf_counter() - start) / steps)
    return 1e3 * statistics.median(seconds)


def main():
    """Run and print."""
    parser = argparse.ArgumentParser(description="Measure particle decoding; prints JSON.")
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    start = time.perf_counter()
    lm = dataclasses.replace(ponder.models.load(), eos_token_ids=())  # every trace has full length
    load_seconds = time.perf_counter() - start
    prompt = lm.tokenizer.encode(TEXT * (args.prompt // 16 + 1))[: args.prompt]

    def program(potential=None):
        return ponder.Generation(lm, prompt, max_new_tokens=args.new_tokens, potential=potential)

    n = args.particles
    result = {
        "settings": vars(args),
        "load_seconds": load_seconds,
        "plain": measure(inference.importance_sampling(program(), n), args.repeats),
        "smc_ess_0.5": measure(inference.smc(program(Noise()), n), args.repeats),
        "smc_every_step": measure(inference.smc(program(Noise()), n, ess_threshold=1.0), args.repeats),
        "smc_regex_every_step": measure(
            inference.smc(program(ponder.regex(r"[A-Za-z ,.'\n]*")), n, ess_threshold=1.0), args.repeats
        ),
        "gemm_floor_ms_per_step": gemm_floor(lm, n, args.repeats),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }
    result["share_of_gemm_floor"] = result["gemm_floor_ms_per_step"] / result["plain"]["ms_per_step"]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
