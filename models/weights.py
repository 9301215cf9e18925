"""Hugging Face tensors to the decoder's parameters and back: one table, read in both directions.

Tensors come as a mapping by name: a dict of arrays, or `LazyTensors`, which reads them from a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ponder.models.config import DecoderConfig
from ponder.models.decoder import Decoder
from ponder.models.messages import quoted

__all__ = ["LazyTensors", "check_shapes", "finite", "from_weights", "to_weights", "weight_table"]


@dataclasses.dataclass(frozen=True, eq=False)
class LazyTensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read from its file whenever it is asked for, and not kept.

    Attributes:
        shapes: of every tensor, known without reading any.
        read: returns the tensor of a name; raises ValueError where the file is damaged.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        expected = self.shapes[name]
        tensor = self.read(name)
        if tensor.shape != expected:  # must not be broadcast to it
            raise ValueError(f"weights: {name} has changed from shape {expected} to {tensor.shape}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def without(self, names: Collection[str]) -> LazyTensors:
        """Return the tensors of all other names."""
        kept = {name: shape for name, shape in self.shapes.items() if name not in names}
        return LazyTensors(kept, self.read)


def weight_table(config: DecoderConfig) -> dict[tuple[str | int, ...], tuple[tuple[str, int], ...]]:
    """Return parameter path -> the Hugging Face tensors, with their rows, that it concatenates."""
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    m, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    table: dict[tuple[str | int, ...], tuple[tuple[str, int], ...]] = {
        ("embedding",): (("model.embed_tokens.weight", config.vocab_size),),
        ("norm",): (("model.norm.weight", m),),
    }
    if not config.tie_word_embeddings:
        table["head",] = (("lm_head.weight", config.vocab_size),)
    for i in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        qkv = (("q_proj", q), ("k_proj", kv), ("v_proj", kv))
        block: dict[str, tuple[tuple[str, int], ...]] = {
            "input_norm": ((f"model.layers.{i}.input_layernorm.weight", m),),
            "qkv": tuple((f"{attention}.{name}.weight", rows) for name, rows in qkv),
            "o": ((f"{attention}.o_proj.weight", m),),
            "post_norm": ((f"model.layers.{i}.post_attention_layernorm.weight", m),),
            "gate_up": ((f"{mlp}.gate_proj.weight", f), (f"{mlp}.up_proj.weight", f)),
            "down": ((f"{mlp}.down_proj.weight", m),),
        }
        if config.qkv_bias:
            block["qkv_bias"] = tuple((f"{attention}.{name}.bias", rows) for name, rows in qkv)
        if config.o_bias:
            block["o_bias"] = ((f"{attention}.o_proj.bias", m),)
        if config.qk_norm:
            block["q_norm"] = ((f"{attention}.q_norm.weight", d),)
            block["k_norm"] = ((f"{attention}.k_norm.weight", d),)
        if config.mlp_bias:
            block["gate_up_bias"] = ((f"{mlp}.gate_proj.bias", f), (f"{mlp}.up_proj.bias", f))
            block["down_bias"] = ((f"{mlp}.down_proj.bias", m),)
        table |= {("blocks", i, name): parts for name, parts in block.items()}
    return table


def check_shapes(config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a checkpoint with what a config implies; nothing of their size is allocated.

    Raises:
        ValueError: a tensor is missing, is not known, or has another shape.
    """
    # A block has several tensors, so this many layers are a lie, and their table could outgrow memory.
    if config.num_hidden_layers > len(shapes):
        raise ValueError(
            f"weights do not fit the config: num_hidden_layers is {config.num_hidden_layers}, but there are "
            f"only {len(shapes)} tensors"
        )
    table = weight_table(config)
    wanted = {name for parts in table.values() for name, _ in parts}
    missing = sorted(wanted - set(shapes))
    unexpected = sorted(set(shapes) - wanted - _ignored(config, shapes))
    if missing or unexpected:
        raise ValueError(
            f"weights do not fit the config: {len(missing)} missing {_some(missing)}, "
            f"{len(unexpected)} unexpected {_some(unexpected)}"
        )
    for path, parts in table.items():
        for name, rows in parts:
            expected = (rows, *_columns(config, path[-1]))
            if tuple(shapes[name]) != expected:
                raise ValueError(f"weights: {name} has shape {tuple(shapes[name])}, expected {expected}")


def from_weights(
    config: DecoderConfig,
    weights: Mapping[str, np.ndarray],
    dtype: Any = None,
    *,
    progress: Callable[[float], None] | None = None,
) -> Decoder:
    """Build a decoder from tensors in Hugging Face names.

    Args:
        config: the sizes.
        weights: every tensor of the checkpoint, `[out, in]`, of any float dtype. Each is asked for when its
            parameter is built, so that of `LazyTensors` one at a time is in memory.
        dtype: of the stored matrices; None means float32. Norms and biases stay float32.
        progress: called with the fraction of the parameters that is on the device, from 0 to 1.

    Raises:
        ValueError: a tensor is missing, is not known, has another shape than the config implies, is not of
            floats, or holds NaN or infinity.
    """
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    lazy = isinstance(weights, LazyTensors)
    check_shapes(config, weights.shapes if lazy else {name: x.shape for name, x in weights.items()})
    if "lm_head.weight" in _ignored(config, weights):
        if not np.array_equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
            raise ValueError(
                "weights: config says tied embeddings, but lm_head.weight differs from embed_tokens"
            )

    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    table = weight_table(config)
    for done, (path, parts) in enumerate(table.items()):
        if progress is not None:
            progress(done / len(table))
        columns = _columns(config, path[-1])
        array = _concatenated(parts, weights, columns, dtype if columns else np.dtype(np.float32))
        _at(decoder, path).set_value(jax.device_put(array))
    if progress is not None:
        progress(1.0)
    return decoder


def _concatenated(
    parts: tuple[tuple[str, int], ...],
    weights: Mapping[str, np.ndarray],
    columns: tuple[int, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """Read the tensors of one parameter into a new array, each let go before the next is read."""
    array, start = np.empty((sum(rows for _, rows in parts), *columns), dtype), 0
    for name, rows in parts:
        array[start : start + rows] = finite(name, weights[name])
        start += rows
    return array


def to_weights(decoder: Decoder) -> dict[str, np.ndarray]:
    """Return the decoder's tensors in Hugging Face names, the inverse of `from_weights`."""
    weights: dict[str, np.ndarray] = {}
    for path, parts in weight_table(decoder.config).items():
        array = np.asarray(jax.device_get(_at(decoder, path).get_value()))
        stops = np.cumsum([rows for _, rows in parts])[:-1]
        pieces = np.split(array, stops) if len(parts) > 1 else [array]
        weights |= {name: piece for (name, _), piece in zip(parts, pieces, strict=True)}
    return weights


def _ignored(config: DecoderConfig, names: Iterable[str]) -> set[str]:
    """Tensors that are known and not used.

    Older checkpoints store rotary frequencies; tied ones may repeat the embedding as the head.
    """
    names = set(names)
    ignored = {name for name in names if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= names:
        ignored.add("lm_head.weight")
    return ignored


def _columns(config: DecoderConfig, parameter: str | int) -> tuple[int, ...]:
    """Shape of a row of a parameter: one number for norms and biases, the inputs for a matrix."""
    if parameter in ("embedding", "head", "qkv", "gate_up"):
        return (config.hidden_size,)
    if parameter == "o":
        return (config.num_attention_heads * config.head_dim,)
    return (config.intermediate_size,) if parameter == "down" else ()


def finite(name: str, weight: np.ndarray) -> np.ndarray:
    """Return a tensor of finite floats as it is (float64 as float32); any other is a ValueError."""
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"weights: {name} has dtype {weight.dtype}, expected floats")
    if weight.dtype.itemsize == 8:  # what float32 cannot hold becomes infinite here, and is found below
        with np.errstate(over="ignore"):
            weight = weight.astype(np.float32)
    if not np.isfinite(weight).all():
        raise ValueError(f"weights: {name} holds NaN or infinity")
    return weight


def _some(names: list[str]) -> str:
    return str(names[:8]) if sum(map(len, names[:8])) <= 800 else quoted(names[:8])


def _at(module: Any, path: tuple[str | int, ...]) -> nnx.Param:
    for key in path:
        module = module[key] if isinstance(key, int) else getattr(module, key)
    return module
