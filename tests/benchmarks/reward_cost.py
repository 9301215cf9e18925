"""What a reward model of the policy's own size costs: steps with it and without it, in turns.

    python tests/benchmarks/reward_cost.py

The reward model is SmolLM2's trunk with a random scalar head, so that both read as many parameters;
it judges each step when it ends. Figures are medians, and the ratio is of neighbours in time.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

import ponder
from ponder.models.reward_model import RewardDecoder, RewardHead


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--step-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    lm = ponder.models.load()
    width = lm.decoder.config.hidden_size
    head = RewardHead([jax.random.normal(jax.random.key(0), (1, width)) / width**0.5], [None])
    prm = RewardDecoder(lm.decoder, head, tokenizer=lm.tokenizer)
    # No EOS and no delimiter that turns up: every step has all its tokens, so that both do the same work.
    unit = ponder.Step("\x00", max_tokens=args.step_tokens, max_steps=args.steps)
    prompt = lm.tokenizer.encode("The sea is wide and deep. " * 10)[:64]
    jobs = {}
    for name, potential in (("policy", None), ("with reward", ponder.process_reward(prm, link="odds"))):
        program = ponder.Generation(
            lm,
            jnp.asarray(prompt),
            max_new_tokens=args.steps * args.step_tokens,
            potential=potential,
            proposal=lambda prior, guide, eos=lm.eos_token_ids: prior.at[:, jnp.asarray(eos)].set(-jnp.inf),
            unit=unit,
        )
        jobs[name] = ponder.inference.smc(program, args.particles, "multinomial", 1.0)
        jobs[name].run(jax.random.key(0)).tokens.block_until_ready()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(args.repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            posterior = job.run(jax.random.key(repeat))
            posterior.tokens.block_until_ready()
            seconds[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(seconds["policy"], seconds["with reward"], strict=True)]
    tokens = args.particles * args.steps * args.step_tokens
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"{name:12s} {1000 * median / args.steps:8.0f} ms a step  {tokens / median:6.0f} tokens/s")
    print(f"ratio {statistics.median(ratios):.2f} (of each pair: {', '.join(f'{r:.2f}' for r in ratios)})")


if __name__ == "__main__":
    main()
