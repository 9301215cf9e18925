"""A model's files, opened: what a directory in hub format and a GGUF file have in common.

Opening reads what is small, the settings and where each tensor lies, and checks it. The tensors and the
tokenizer are read when they are asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ponder.models.config import DecoderConfig
from ponder.models.loading.tokenizer import HubTokenizer
from ponder.models.weights import LazyTensors

__all__ = ["Checkpoint"]


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened model. Whatever its format, settings and tensors have the names that they have on the hub.

    Attributes:
        file: the directory or file as errors about it are to name it.
        raw_config: config.json, or what it would be.
        config: the decoder's reading of it.
        eos_token_ids: tokens that end a generation; may be empty.
        tensors: the weights, `[out, in]`.
        read_tokenizer: returns the tokenizer, or None where there is none.
    """

    file: str
    raw_config: Mapping[str, Any]
    config: DecoderConfig
    eos_token_ids: tuple[int, ...]
    tensors: LazyTensors
    read_tokenizer: Callable[[], HubTokenizer | None]
