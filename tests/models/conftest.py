"""Small GGUF files, written from the checkpoints in fixtures/ the way llama.cpp's converter does."""

from pathlib import Path

import numpy as np
import pytest

CHECKPOINTS = Path(__file__).parent / "fixtures"

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, "Ġ", "ĠĠ", *"abcdefghijklmnopqrstuvwxyz", *"0123456789", "Ċ", "he", "ll", "hell", "hello"]
MERGES = ["Ġ Ġ", "h e", "l l", "he ll", "hell o"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


def permute(weight, num_heads):
    """What llama.cpp does to the q and k rows of Llama models."""
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def write_gguf(tmp_path):
    """Write a checkpoint of fixtures/ as GGUF; `tensors` replaces or (None) drops single ones.

    `quantize` names tensors to store as `kind`; `metadata` adds or replaces fields.
    """
    import gguf

    from ponder.models.loading import hub

    def write(
        name,
        *,
        architecture,
        tensors=None,
        quantize=(),
        kind="Q8_0",
        metadata=None,
        pre="smollm",
        file="tiny.gguf",
    ):
        config, weights = hub.read_config(CHECKPOINTS / name), dict(hub.read_tensors(CHECKPOINTS / name))
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
        to_gguf = gguf.get_tensor_name_map(
            {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[
                architecture
            ],
            config["num_hidden_layers"],
        )
        found = {}
        for hub_name, weight in weights.items():
            stem, _, suffix = hub_name.rpartition(".")
            if architecture == "llama" and stem[-6:] in ("q_proj", "k_proj"):
                weight = permute(weight, heads[stem[-6]])
            found[f"{to_gguf.get_name(stem)}.{suffix}"] = weight.astype(np.float32)
        found |= tensors or {}

        path = tmp_path / file
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        if "head_dim" in config:
            writer.add_key_length(config["head_dim"])
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        unused = [f"[PAD{i}]" for i in range(len(TOKENS), config["vocab_size"])]
        writer.add_token_list([*TOKENS, *unused])
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)) + [5] * len(unused))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(0)
        writer.add_chat_template(TEMPLATE)
        for key, value in (metadata or {}).items():
            add = {
                str: writer.add_string,
                int: writer.add_uint32,
                float: writer.add_float32,
                bool: writer.add_bool,
                list: writer.add_array,
            }[type(value)]
            add(key, value)
        qtype = gguf.GGMLQuantizationType[kind]
        for tensor_name, weight in found.items():
            if weight is None:
                continue
            if tensor_name in quantize:
                writer.add_tensor(tensor_name, gguf.quants.quantize(weight, qtype), raw_dtype=qtype)
            else:
                writer.add_tensor(tensor_name, np.ascontiguousarray(weight))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
