"""How far the scores of the shipped reward models are probabilities: calibration error by step, and a plot.

    python tests/benchmarks/reliability.py --plot reliability.png

Traces are those of the gates: 64 of each of 150 held-out problems, drawn by the policy. The outcome that a
score predicts is the exact value: all is right so far, and can still end well. A map (isotonic) is fitted on
the traces of one half of the problems, and the error after it is that of the other half.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import ponder
from ponder.models.loading.shipped import CHECKPOINTS
from ponder.tasks import countdown, operation_chain
from ponder.tasks.training.reward_gates import check_gates

TASKS = {"countdown": countdown, "chain": operation_chain}


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["countdown-tiny-prm", "countdown-tiny-rollout-prm", "chain-tiny-prm"]
    parser.add_argument("--models", type=lambda text: text.split(","), default=names)
    parser.add_argument("--problems", type=int, default=150)
    parser.add_argument("--plot", type=Path, help="draw the first and the last step of each model")
    args = parser.parse_args()
    import matplotlib.pyplot as plt

    size = (5.5 * len(args.models), 11)
    figure, axes = plt.subplots(2, len(args.models), figsize=size, squeeze=False, layout="constrained")
    for column, name in enumerate(args.models):
        task_name = name.split("-")[0]
        policy = ponder.models.load(f"{task_name}-tiny")
        print(name)
        found = check_gates(policy, CHECKPOINTS / name, TASKS[task_name], args.problems, strict=False)
        scores, values = found["scores"], found["values"] > 0.5
        for step in range(scores.shape[2]):
            written = ~np.isnan(scores[..., step])
            fitted = written & (np.arange(len(written)) % 2 == 0)[:, None]
            rest = written & ~fitted
            map_ = ponder.calibration.isotonic(scores[fitted, step], values[fitted, step])
            errors = [
                ponder.calibration.expected_calibration_error(found, values[rest, step])
                for found in (scores[rest, step], np.asarray(map_(scores[rest, step])))
            ]
            print(
                f"expected calibration error after step {step + 1}: {errors[0]:.3f}, mapped {errors[1]:.3f}"
            )
            if step in (0, scores.shape[2] - 1):
                ax = axes[int(step > 0), column]
                ponder.plot_reliability(scores[written, step], values[written, step], ax=ax)
                ax.set_title(f"{name}, step {step + 1}\n{ax.get_title(loc='left')}", loc="left")
    if args.plot:
        figure.savefig(args.plot, dpi=110)


if __name__ == "__main__":
    main()
