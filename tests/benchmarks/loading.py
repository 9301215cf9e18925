"""What loading costs: time and peak memory of a model, or CPU seconds to dequantise each GGUF type.

    python tests/benchmarks/loading.py                     # the embedded model
    python tests/benchmarks/loading.py DIRECTORY_OR_FILE
    python tests/benchmarks/loading.py --types

The peak is that of the whole process, so each model wants a process of its own. Types are measured on random
bytes of as many weights as SmolLM2-135M has, in tensors of its number and size, with rows of 512: those of
the model, 576, do not divide into the blocks of 256 of the larger types. Never a test.
"""

import argparse
import resource
import time

SHAPES = {(55296, 512): 1, (1728, 512): 90, (648, 512): 60, (216, 512): 60}  # and how many of each


def peak_mb():
    """Return the largest resident size so far (Linux counts it in kB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def load(name):
    """Load a model and print what it took."""
    import jax

    import ponder.models

    ponder.models.load  # noqa: B018 (its imports are not to be counted)
    jax.devices()
    before, start, cpu = peak_mb(), time.perf_counter(), time.process_time()
    lm = ponder.models.load(name)
    jax.block_until_ready(jax.tree.leaves(lm))
    size = sum(x.nbytes for x in jax.tree.leaves(lm)) / 1e6
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{seconds:.2f} s, {cpu:.2f} s CPU; weights {size:.0f} MB; peak {before:.0f} -> {peak_mb():.0f} MB")


def time_types():
    """Print the CPU seconds of each type that the gguf package dequantises."""
    import gguf
    import numpy as np

    from ponder.models.loading.gguf import dequantise

    rng = np.random.default_rng(0)
    count = sum(rows * columns * number for (rows, columns), number in SHAPES.items())
    print(f"{count / 1e6:.1f} million weights")
    for kind in gguf.GGMLQuantizationType:
        elements, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        seconds = 0.0
        try:
            for (rows, columns), number in SHAPES.items():
                data = rng.integers(0, 60, (rows, columns // elements * num_bytes), dtype=np.uint8)
                repeats = min(number, 3)
                start = time.process_time()
                for _ in range(repeats):
                    dequantise(data, kind.value)
                seconds += (time.process_time() - start) * number / repeats
        except NotImplementedError:
            continue
        print(f"{kind.name:8} {seconds:5.2f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--types", action="store_true", help="dequantise synthetic tensors of every type")
    args = parser.parse_args()
    time_types() if args.types else load(args.model)
