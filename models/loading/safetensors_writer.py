"""Write a safetensors file one tensor at a time.

`safetensors.numpy.save_file` wants all tensors in memory at once; a converter has them one after another.
The format is eight bytes of header length, a JSON header with shapes and offsets, then the raw tensors.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

__all__ = ["write_safetensors"]


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Callable[[], np.ndarray]],
    *,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write float32 tensors, computing each only when it is its turn.

    Args:
        path: The file to write.
        shapes: Shape of every tensor, in the order of writing.
        sources: For every name, a function that returns the tensor.
        progress: Called with the written fraction, from 0 to 1.

    Raises:
        ValueError: A function returned another shape than announced.
        OSError: The disk has too little room, which is found out before the first tensor is computed.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
    start = 0
    for name, shape in shapes.items():
        end = start + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    free = shutil.disk_usage(path.parent).free
    if start > free:
        raise OSError(
            errno.ENOSPC,
            f"the weights need {start / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free",
            str(path),
        )
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # tensors start on a multiple of eight bytes
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        written = 0
        for name, shape in shapes.items():
            if progress is not None:
                progress(written / max(start, 1))
            tensor = sources[name]()
            if tensor.shape != shape:
                raise ValueError(f"tensor {name!r}: expected shape {shape}, got {tensor.shape}.")
            file.write(np.ascontiguousarray(tensor, dtype="<f4").data)
            written += tensor.size * 4
    if progress is not None:
        progress(1.0)
