"""Particle filtering against search on the shipped reasoning tasks: accuracy, intervals, and calibration.

    python tests/benchmarks/reasoning.py --task countdown --reward exact
    python tests/benchmarks/reasoning.py --task countdown --reward learned --methods best_of_n,filter
    python tests/benchmarks/reasoning.py --task countdown --reward overconfident --particles 16,32
    python tests/benchmarks/reasoning.py --task chain --methods posterior --calibration calibration.png

Each method picks one trace a problem, and `grade` checks every step of it. An accuracy has a credible
interval under Beta(1, 1) (Bowyer et al., 2025, arXiv:2503.01747). All seeds have the same problems, so
it counts each problem once, with its mean over the seeds: wider than if all runs were independent. A
difference between methods is paired by problem, and its standard error is over problems in the same
way. Rewards: `exact` is the value by enumeration; `learned` and `rollout` are the shipped reward
models; `synthetic` and `overconfident` are exact values with noise. The method `posterior` is SMC under
the link "bernoulli"; where a problem has one right answer (the chain), the probability of its most
probable answer is compared with how often that is right.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy import stats

import ponder
from ponder import inference
from ponder.models.loading.shipped import SHIPPED_MODELS
from ponder.tasks import countdown, countdown_five, operation_chain, synthetic_reward

TASKS = {"countdown": countdown, "countdown-five": countdown_five, "chain": operation_chain}
METHODS = (
    "best_of_n",
    "vote",
    "filter",
    "filter_sampled",
    "systematic",
    "ratio",
    "entropic",
    "entropic_published",
    "entropic_target",
    "ahead",
    "posterior",
)


def reward_name(task_name: str, kind: str) -> str:
    """Name of a shipped reward model."""
    return f"{task_name}-tiny-{'rollout-' if kind == 'rollout' else ''}prm"


def reward(task_name: str, kind: str, auc: float) -> Any:
    """The reward model of a kind, for `ponder.process_reward`."""
    task = TASKS[task_name]
    if kind in ("learned", "rollout"):
        return ponder.models.load_reward(reward_name(task_name, kind))
    if kind == "exact":
        return ponder.text_reward(task.exact_reward)
    noise = synthetic_reward.noise_for_auc(auc)
    return ponder.text_reward(
        functools.partial(task.synthetic_reward, noise=noise, overconfidence=kind == "overconfident")
    )


def algorithm(method: str, make: Callable[..., Any], n: int) -> Any:
    """Build a method over `make(link)`, a program with the reward under that link."""
    if method == "best_of_n":
        return inference.best_of_n(make("ratio"), n)
    if method == "vote":
        return inference.majority_vote(make("ratio"), n, extract=last_line)
    if method in ("filter", "filter_sampled"):  # Puri et al. (2025)
        return inference.smc(make("odds"), n, resampling="multinomial", ess_threshold=1.0)
    if method == "systematic":
        return inference.smc(make("odds"), n, ess_threshold=1.0)
    if method in ("ratio", "posterior"):
        return inference.smc(make("ratio" if method == "ratio" else "bernoulli"), n)
    if method == "entropic_target":  # at the first two steps, whatever the reward model says
        return inference.entropic_smc(make("odds"), n, rule="target", anneal_until=0.7, corrected=False)
    return inference.entropic_smc(
        make("odds"), n, corrected=method != "entropic_published", lookahead=method == "ahead"
    )


def pick(method: str, posterior: ponder.Posterior, rng: np.random.Generator) -> str:
    """The text of the trace that a method settles on: the heaviest, the first of several."""
    if method == "filter_sampled":
        row = rng.choice(len(posterior), p=posterior.weights)
    else:
        row = int(np.argmax(posterior.log_weights))
    return posterior.text[row]


def last_line(text: str) -> str:
    """What a vote counts: a trace ends on its answer."""
    return text.removesuffix("\n").split("\n")[-1]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run every method; the result is `correct[method][n]`, bool[seeds · problems], and token counts."""
    task = TASKS[args.task]
    lm = ponder.models.load(f"{args.task}-tiny")
    prm = reward(args.task, args.reward, args.auc)
    prompts = [task.prompt_text(p) for p in task.problems(args.first_seed, args.problems, held_out=True)]
    unit = ponder.Step("\n", max_tokens=task.MAX_NEW_TOKENS, max_steps=task.NUM_STEPS + 1)

    def program(batch: list[str], link: str) -> ponder.Generation:
        potential = ponder.process_reward(prm, link=link)
        return ponder.Generation(
            lm,
            batch,
            max_new_tokens=task.MAX_NEW_TOKENS,
            potential=potential,
            unit=unit,
            temperature=args.temperature,
        )

    correct: dict[str, dict[int, list[bool]]] = {m: {n: [] for n in args.particles} for m in args.methods}
    tokens: dict[str, dict[int, list[int]]] = {m: {n: [] for n in args.particles} for m in args.methods}
    confidence: list[tuple[float, bool]] = []
    for method in args.methods:
        for n in args.particles:
            started = time.perf_counter()
            size = max(1, min(len(prompts), args.rows // n))
            for seed in range(args.seeds):
                rng = np.random.default_rng(seed)
                for start in range(0, len(prompts), size):
                    # The last batch is filled up, so that all have one shape and one compilation.
                    batch = (prompts[start : start + size] + prompts)[:size]
                    made = algorithm(method, functools.partial(program, batch), n)
                    key = jax.random.fold_in(jax.random.key(seed), start)
                    posteriors = made.run(key)[: len(prompts) - start]
                    for prompt, posterior in zip(batch, posteriors, strict=False):
                        correct[method][n].append(task.grade(prompt, pick(method, posterior, rng)).correct)
                        tokens[method][n].append(int(posterior.stats.tokens_generated))
                        if method == "posterior" and args.task == "chain" and n == max(args.particles):
                            confidence.append(top_answer(prompt, posterior))
            print(
                f"{method:20s} N={n:<3d} {line(correct[method][n], args.seeds)}  "
                f"{np.mean(tokens[method][n]):7.0f} tokens  {time.perf_counter() - started:6.1f} s",
                flush=True,
            )
    return {"correct": correct, "tokens": tokens, "confidence": confidence}


def top_answer(prompt: str, posterior: ponder.Posterior) -> tuple[float, bool]:
    """Probability of the most probable answer of a chain, and whether it is right."""
    answers = posterior.answers(functools.partial(operation_chain.extract_answer, prompt))
    last = operation_chain.solution(operation_chain.parse_prompt(prompt))[-1]
    return float(answers.probability[0]), answers.mode() == f"{last.value:02d}"


def line(correct: list[bool], num_seeds: int) -> str:
    """Accuracy with a 95% Beta credible interval over problems."""
    n = len(correct) // num_seeds
    k = sum(correct) / num_seeds
    low, high = stats.beta.interval(0.95, 1 + k, 1 + n - k)
    return f"{k / n:.3f} [{low:.3f}, {high:.3f}]"


def paired(
    correct: dict[str, dict[int, list[bool]]], num_seeds: int, baseline: str = "best_of_n"
) -> list[str]:
    """Differences from the baseline at the same number of particles."""
    lines = []
    for method, by_n in correct.items():
        for n, found in by_n.items():
            if method != baseline and baseline in correct:
                difference = np.subtract(found, correct[baseline][n], dtype=float)
                difference = difference.reshape(num_seeds, -1).mean(axis=0)
                error = difference.std(ddof=1) / np.sqrt(len(difference))
                lines.append(f"{method} - {baseline} at N={n}: {difference.mean():+.3f} (s.e. {error:.3f})")
    return lines


def main() -> None:
    """Parse the arguments, run, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(x) for x in text.split(",")]  # noqa: E731
    parser.add_argument("--task", choices=sorted(TASKS), default="countdown")
    kinds = ("exact", "learned", "rollout", "synthetic", "overconfident")
    parser.add_argument("--reward", choices=kinds, default="exact")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["best_of_n", "filter"])
    parser.add_argument("--particles", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1000, help="of the problems; held out in any case")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--auc", type=float, default=0.85, help="of a synthetic reward model")
    parser.add_argument("--rows", type=int, default=1024, help="particles of all prompts in one batch")
    parser.add_argument("--json", help="write all outcomes to this file")
    parser.add_argument("--calibration", help="draw the reliability of the answers' posterior")
    args = parser.parse_args()
    unknown = sorted(set(args.methods) - set(METHODS))
    if unknown:
        parser.error(f"--methods: expected some of {', '.join(METHODS)}, got {', '.join(unknown)}")
    if args.calibration and (args.task != "chain" or "posterior" not in args.methods):
        parser.error("--calibration: needs --task chain and --methods posterior")
    if args.reward in ("learned", "rollout") and reward_name(args.task, args.reward) not in SHIPPED_MODELS:
        parser.error(f"--reward: {args.task} has no {args.reward} reward model")

    print(f"{args.task}, {args.reward} reward, {args.problems} held-out problems, {args.seeds} seeds")
    result = run(args)
    print(*paired(result["correct"], args.seeds), sep="\n")
    if result["confidence"]:
        scores, outcomes = map(np.asarray, zip(*result["confidence"], strict=True))
        error = ponder.calibration.expected_calibration_error(scores, outcomes)
        print(f"posterior of the most probable answer: expected calibration error {error:.3f}")
        if args.calibration:
            ponder.plot_reliability(scores, outcomes).figure.savefig(args.calibration, dpi=150)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"command": sys.argv, **result}, file)


if __name__ == "__main__":
    main()
