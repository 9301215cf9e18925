"""The command line: what it prints and writes, how it fails, and that it is quick to answer."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

import ponder
from ponder.cli.app import app
from ponder.cli.compilation import keep_compilations
from ponder.cli.inputs import unescaped
from ponder.models import PieceTokenizer, TableLM

SMALL = ("--particles", 4, "--max-new-tokens", 4)  # the same shapes, so that one compilation serves
PIECES = (b"the ", b"[red]cat ", b"sat\n", b"\x1b[31m", b"dog ", b"")


@pytest.fixture(autouse=True)
def compilations_not_kept(monkeypatch):
    """JAX is to stay as it is for the other tests of this process."""
    monkeypatch.setattr("ponder.cli.compilation.keep_compilations", lambda: None)


@pytest.fixture
def lm():
    return TableLM.random(jax.random.key(3), 6, order=1, eos_token_ids=(5,), tokenizer=PieceTokenizer(PIECES))


@pytest.fixture
def loaded(monkeypatch, lm):
    """Names and dtypes that were asked of `ponder.models.load`, which gives the table instead."""
    calls = []

    def load(name, *, dtype=None, progress=None):
        calls.append((name, dtype))
        return lm

    monkeypatch.setattr(ponder.models, "load", load)
    return calls


def invoke(*args, stdin=None):
    return CliRunner().invoke(app, ["sample", *map(str, args)], input=stdin)


def read_strict(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_sample_prints_the_posterior(loaded):
    result = invoke("the ", *SMALL)
    assert result.exit_code == 0, result.output
    assert loaded == [("smollm2-135m-instruct", None)]
    for word in ("weight", "text", "log evidence", "ESS", "distinct traces", "tokens per second"):
        assert word in result.stdout
    assert "%" in result.stdout
    # Neither the trace's own control codes nor any of ours; its brackets are no markup.
    assert "\x1b" not in result.output
    assert "\\x1b[31m" in result.stdout or "[red]cat" in result.stdout


def test_it_gives_what_the_library_gives(loaded, lm, tmp_path):
    out = tmp_path / "out.json"
    options = ["--particles", 6, "--max-new-tokens", 4, "--seed", 5, "--power", 1.5, "--temperature", 0.8]
    result = invoke("the ", *options, "--stop", "dog ", "--force-eos", "--ess-threshold", 1.0, "--json", out)
    assert result.exit_code == 0, result.output
    program = ponder.Generation(
        lm,
        "the ",
        max_new_tokens=4,
        potential=ponder.power(1.5),
        temperature=0.8,
        stop=("dog ",),
        overflow="force_eos",
    )
    expected = ponder.inference.smc(program, num_particles=6, ess_threshold=1.0).run(jax.random.key(5))
    found = read_strict(out)
    assert found["log_evidence"] == pytest.approx(float(expected.log_evidence), rel=1e-5)
    assert found["ess"] == pytest.approx(expected.ess, rel=1e-5)
    merged = expected.unique()
    assert [trace["text"] for trace in found["traces"]] == merged.text
    np.testing.assert_allclose([trace["weight"] for trace in found["traces"]], merged.weights, rtol=1e-5)
    first = found["traces"][0]
    assert first["tokens"] == np.asarray(merged.tokens)[0, : int(merged.lengths[0])].tolist()
    assert first["log_prior"] == pytest.approx(float(merged.log_prior[0]), rel=1e-5)
    assert first["log_potential"] == pytest.approx(float(merged.log_potential[0]), rel=1e-5)
    assert found["prompt"] == "the "
    assert found["settings"]["stop"] == ["dog "]
    assert found["settings"]["chat"] is False
    assert len(found["ess_per_step"]) == found["num_steps"] == int(expected.stats.num_steps)
    assert found["timings"]["tokens_per_second"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_importance_sampling_and_other_options(loaded, tmp_path):
    out = tmp_path / "out.json"
    result = invoke(
        "the ", *SMALL, "--method", "importance_sampling", "--dtype", "bfloat16", "--chat", "--json", out
    )
    assert result.exit_code == 0, result.output
    assert loaded == [("smollm2-135m-instruct", "bfloat16")]
    assert result.stderr.splitlines() == [
        "loading smollm2-135m-instruct ...",
        "compiling ...",
        "sampling ...",
    ]
    assert read_strict(out)["settings"]["chat"] is True


def test_from_stdin_to_stdout_without_the_stop(loaded):
    """The report goes to stderr; an escape in --stop is read, and the text ends before it."""
    options = ["--stop", r"\n", "--stop", r"\x1b", "--cut-stop", "--json", "-"]
    result = invoke("-", *SMALL, *options, stdin="the \n")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["prompt"] == "the "  # without the line break at the end
    assert found["settings"]["stop"] == ["\n", "\x1b"] and found["settings"]["cut_stop"] is True
    texts = [trace["text"] for trace in found["traces"]]
    assert "sat" in {text.split()[-1] for text in texts if text} and not any("\n" in text for text in texts)
    for word in ("weight", "log evidence", "ESS", "tokens per second"):
        assert word in result.stderr


def test_escapes():
    read = {r"\n\t\r": "\n\t\r", r"\\n": r"\n", r"\x41\u00e9": "Aé"}
    read |= {text: text for text in (r"\d", r"\boxed{", r"\xi", r"\u12", "\\")}
    for text, expected in read.items():
        assert unescaped(text) == expected


def test_evidence_from_stdin(loaded):
    result = invoke("the ", "--grammar", "-", stdin="start: nonsense")
    assert (result.exit_code, loaded) == (2, [])
    assert "grammar('start: nonsense')" in result.stderr


def test_regex_holds(loaded, tmp_path):
    out = tmp_path / "out.json"
    result = invoke("the ", *SMALL, "--regex", "(the |dog )+", "--json", out)
    assert result.exit_code == 0, result.output
    texts = {trace["text"] for trace in read_strict(out)["traces"]}
    assert texts and all(set(text.split()) <= {"the", "dog"} for text in texts)


def test_evidence_of_zero_is_null_and_an_error(loaded, lm, monkeypatch, tmp_path):
    table = jnp.asarray(lm.table).at[:, 5].set(-jnp.inf)  # EOS never comes, and --force-eos asks for it
    endless = TableLM(table, (5,), lm.tokenizer)
    monkeypatch.setattr(ponder.models, "load", lambda *_, **__: endless)
    out = tmp_path / "out.json"
    result = invoke("the ", *SMALL, "--force-eos", "--json", out)
    assert result.exit_code == 3, result.output
    assert result.stderr.splitlines()[-1].startswith(
        "Error: every particle has weight zero (log evidence -inf)"
    )
    assert "Warning" not in result.stderr and ".py" not in result.stderr
    assert not result.stdout  # no table: its weights would mean nothing
    found = read_strict(out)
    assert found["log_evidence"] is None and found["degenerate"] is True


def test_save_is_read_without_a_model(loaded, tmp_path):
    out, table = tmp_path / "out.safetensors", tmp_path / "out.json"
    result = invoke("the ", *SMALL, "--save", out, "--json", table)
    assert result.exit_code == 0, result.output
    posterior = ponder.Posterior.load(out)
    assert posterior.unique().text == [trace["text"] for trace in read_strict(table)["traces"]]


def test_loading_shows_its_progress_if_it_can(monkeypatch, lm):
    def load(name, *, dtype=None, progress=None):
        for done in (0.0, 0.5, 1.0):
            progress("reading", done)
        return lm

    monkeypatch.setattr(ponder.models, "load", load)
    result = invoke("the ", *SMALL)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[1:] == ["reading ...", "compiling ...", "sampling ..."]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--regex", "zebra"], ["Error: regex", "zebra"]),  # no token of this model writes it
        (["--regex", "(the ){9}"], ["Error: regex"]),  # longer than the limit
    ],
)
def test_evidence_that_no_text_can_meet(loaded, options, words):
    result = invoke("the ", *SMALL, *options)
    assert result.exit_code == 2 and not result.stdout
    assert all(word in result.stderr.splitlines()[-1] for word in words), result.stderr


def test_a_limit_of_the_grammar_engine_is_one_line(loaded, tmp_path, capfd):
    rules = [f'r{i}: "dog " "the "' for i in range(2100)]  # as many items of a row; the limit is 2000
    start = f'start: "the " ({" | ".join(f"r{i}" for i in range(2100))})'
    (tmp_path / "g.lark").write_text("\n".join([start, *rules]))
    result = invoke("the ", *SMALL, "--grammar", tmp_path / "g.lark")
    assert result.exit_code == 1 and not result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: --grammar: grammar(") and "max is 2000" in last
    assert "Traceback" not in result.stderr + capfd.readouterr().err


def test_refused_grammars_are_one_line(loaded, tmp_path):
    (tmp_path / "g.lark").write_text("start: xx\nfoo: 'a'\n")
    result = invoke("the ", "--grammar", tmp_path / "g.lark")
    assert (result.exit_code, loaded) == (2, [])
    assert sum("refuses the grammar" in line for line in result.stderr.splitlines()) == 1
    assert "|" not in result.stderr and "^" not in result.stderr


def test_a_model_without_tokenizer_is_bad_input(monkeypatch, lm):
    bare = TableLM(lm.table, lm.eos_token_ids)
    monkeypatch.setattr(ponder.models, "load", lambda *_, **__: bare)
    result = invoke("the ")
    assert result.exit_code == 2 and "it has no tokenizer" in result.stderr


def test_a_full_disk_is_told_in_one_line(loaded, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / ".out.json.temporary"))

    monkeypatch.setattr(os, "replace", full)
    out = tmp_path / "out.json"
    result = invoke("the ", *SMALL, "--json", out)
    assert result.exit_code == 1 and not list(tmp_path.iterdir())
    assert result.stderr.splitlines()[-1] == f"Error: --json {out}: No space left on device"


@pytest.fixture
def _no_compilation_cache():
    """The tests have a compilation cache, and the command line leaves one that is there alone."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.mark.usefixtures("_no_compilation_cache")
def test_compilations_are_kept_where_possible(monkeypatch, tmp_path):
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    (tmp_path / "file").write_text("no folder")
    with warnings.catch_warnings():
        monkeypatch.setenv("PONDER_CACHE", str(tmp_path / "file"))
        keep_compilations()
        assert not settings
        monkeypatch.setenv("PONDER_CACHE", str(tmp_path))
        keep_compilations()
        (folder,) = (tmp_path / "xla").iterdir()
        assert settings["jax_compilation_cache_dir"] == str(folder)
        for age in range(203):
            entry = folder / f"{age}-cache"
            entry.touch()
            os.utime(entry, (age, age))
        keep_compilations()
        assert sorted(int(path.name.removesuffix("-cache")) for path in folder.iterdir()) == [*range(3, 203)]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot_is_written(loaded, tmp_path, ending):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"out.{ending}"
    result = invoke("the ", *SMALL, "--plot", out)
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 1000
    assert out.stat().st_mode & 0o444 == 0o444 & ~_umask()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--particles", "0"], ["--particles", "0"]),
        (["--particles", "x"], ["--particles"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "0"]),
        (["--method", "magic"], ["--method", "smc", "importance_sampling", "magic"]),
        (["--temperature", "0"], ["--temperature", "> 0", "0"]),
        (["--temperature", "nan"], ["--temperature", "nan"]),
        (["--power", "-1"], ["--power", "> 0", "-1"]),
        (["--ess-threshold", "1.5"], ["--ess-threshold", "1.5"]),
        (["--ess-threshold", "nan"], ["--ess-threshold", "nan"]),
        (["--resampling", "magic"], ["--resampling", "systematic", "magic"]),
        (
            ["--method", "importance_sampling", "--resampling", "residual"],
            ["--resampling", "no such setting"],
        ),
        (["--stop", ""], ["--stop", "empty"]),
        (["--stop", "\udcff"], ["--stop", "lone surrogates"]),
        (["--cut-stop"], ["--cut-stop", "no --stop"]),
        (["--regex", "a", "--regex", "b"], ["--regex", "expected once, got it 2 times", "not combined"]),
        (["--power", "2", "--power", "2"], ["--power", "expected once"]),
        (["--json", "a", "--json", "b"], ["--json", "expected once"]),
        (["--grammar", "-", "--json-schema", "-"], ["--grammar", "already read for --json-schema"]),
        (["--save", "-"], ["--save", ".safetensors"]),
        (["--plot", "-"], ["--plot", ".png"]),
        (["--tempreture", "2"], ["No such option: --tempreture"]),
        (["--regex", "("], ["--regex", "("]),
        (["--dtype", "int8"], ["--dtype", "int8"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--json", "missing/out.json"], ["--json", "missing"]),
        (["--json", "."], ["--json", "expected a file"]),
        (["--plot", "out.txt"], ["--plot", ".png", "out.txt"]),
        (["--plot", "missing/out.png"], ["--plot", "missing"]),
        (["--save", "out.pkl"], ["--save", ".safetensors", "out.pkl"]),
        (["--json", "a.svg", "--plot", "a.svg"], ["--plot", "the same file as --json"]),
    ],
)
def test_bad_options_are_refused_before_loading(loaded, options, words):
    result = invoke("the ", *options)
    assert result.exit_code == 2, result.output
    assert not loaded
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.output and not result.stdout


@pytest.mark.parametrize(
    ("prompt", "stdin", "message"),
    [
        ("", None, "expected some text, got an empty string"),
        ("-", "", "expected some text, got an empty string"),
        ("-", b"\xff", "cannot read stdin"),
        ("a\udcff", None, "a lone surrogate at 1"),
    ],
    ids=repr,
)
def test_bad_prompts_are_refused(loaded, prompt, stdin, message):
    result = invoke(prompt, stdin=stdin)
    assert (result.exit_code, loaded) == (2, [])
    assert "PROMPT" in result.stderr and message in result.stderr


@pytest.mark.parametrize("prompt", ["-5 + 3 =", "- a list", "--- title", "--And then?"])
def test_a_prompt_that_begins_with_a_dash_gets_a_hint(loaded, prompt):
    result = invoke(prompt, "--seed", 1)
    assert (result.exit_code, loaded) == (2, [])
    assert "comes last, after --:  ponder sample [OPTIONS] -- PROMPT" in result.stderr
    followed = invoke("--max-new-tokens", 3, "--", prompt)  # this model has no such tokens
    assert loaded and f"no token starts {prompt!r}" in followed.stderr


def test_gbnf_gets_a_hint(loaded, tmp_path):
    (tmp_path / "g.gbnf").write_text('root ::= "a" | "b"')
    result = invoke("the ", "--grammar", tmp_path / "g.gbnf")
    assert (result.exit_code, loaded) == (2, [])
    assert "rules with ::= are GBNF" in result.stderr and "gbnf_to_lark" in result.stderr
    (tmp_path / "g.lark").write_text("start: xx")
    assert "GBNF" not in invoke("the ", "--grammar", tmp_path / "g.lark").stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("no such model"), 2), (ImportError("not installed"), 1), (OSError("no hub"), 1)],
)
def test_errors_of_the_loader_name_the_model(monkeypatch, error, code):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(ponder.models, "load", load)
    result = invoke("the ", "--model", "some-model")
    assert result.exit_code == code
    assert f"Error: --model some-model: {error}" in result.stderr


def test_errors_of_the_program_are_one_line(loaded):
    result = invoke("zebra", "--max-new-tokens", 3)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: text: no token starts 'zebra'")


def test_interrupt_while_loading(monkeypatch, tmp_path):
    def load(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ponder.models, "load", load)
    result = invoke("the ", "--json", tmp_path / "out.json")
    assert result.exit_code == 130  # `main` says the rest: see the tests from the shell
    assert not list(tmp_path.iterdir())


def test_interrupt_while_writing_leaves_no_file(loaded, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    old = tmp_path / "out.json"
    old.write_text("old")
    monkeypatch.setattr(os, "replace", interrupt)
    result = invoke("the ", *SMALL, "--json", old)
    assert result.exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert old.read_text() == "old"


def test_help_teaches():
    for args in (["--help"], ["sample", "--help"]):
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0
        assert "ponder sample" in result.output
    for word in ("log evidence", "ESS", "weight", "--particles", "--save", "--method"):
        assert word in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert "PONDER_CACHE" in CliRunner().invoke(app, ["--help"]).output
    assert "Examples:" in result.output and '  ponder sample "Name a colour of the rainbow."' in result.output
    assert CliRunner().invoke(app, ["--version"]).output == f"ponder {ponder.__version__}\n"


def test_without_typer_the_extra_is_named():
    code = "import sys; sys.modules['typer'] = None; from ponder.cli.entry import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "ponder: the command line needs typer and rich: pip install 'ponder-ppl[cli]'\n"


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['ponder', '--help']\n"
        "from ponder.cli.entry import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('flax', 'transformers', 'matplotlib', 'ponder.inference') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_the_embedded_model_from_the_shell(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "ponder", "sample", "Name a day of the week.", "--json", str(out)]
    command += ["--regex", "[A-Z][a-z]+day", "--particles", "4", "--max-new-tokens", "6"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}  # a terminal that cannot show all of the text
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    found = read_strict(out)
    assert found["settings"]["chat"] is True
    assert all(trace["text"].endswith("day") for trace in found["traces"])
    assert sum(trace["weight"] for trace in found["traces"]) == pytest.approx(1.0, abs=1e-5)


# A runner in the background has SIGINT ignored, and children inherit that.
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent the POSIX way")
@pytest.mark.parametrize("module", ["typer", "jax", "numpy", "ponder.inference", "rich.progress"])
def test_ctrl_c_during_imports(module):
    """SIGINT at the moment when a module starts to be imported."""
    start = INTERRUPTIBLE + (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from ponder.cli.entry import main; main()"
    )
    command = [sys.executable, "-c", start, "sample", "Hello", "--model", "no-such-model"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (130, ""), result.stderr
    assert result.stderr == "ponder: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent the POSIX way")
def test_ctrl_c_in_a_garbage_collection_callback():
    """JAX has such a callback, and Python swallows what it raises."""
    code = INTERRUPTIBLE + (
        "import gc, os, time\n"
        "from ponder.cli import interrupts\n"
        "signal.signal(signal.SIGINT, interrupts._leave)\n"
        "interrupts.unwind_on_interrupt()\n"
        "def callback(phase, info):\n"
        "    gc.callbacks.remove(callback)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0)\n"
        "gc.callbacks.append(callback)\n"
        "try:\n"
        "    gc.collect()\n"
        "    time.sleep(20)\n"
        "except KeyboardInterrupt: print('unwound')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr, result.returncode) == ("unwound\n", "", 0)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent the POSIX way")
@pytest.mark.parametrize("delay", [0.15, 0.3, 0.5, 0.8, 1.2, 2.0, 3.0])
def test_ctrl_c_after_a_while(delay):
    start = INTERRUPTIBLE + "from ponder.cli.entry import main; print(flush=True); main()"
    command = [sys.executable, "-c", start, "sample", "Hello", "--max-new-tokens", "400"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "ponder: interrupted" and "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent the POSIX way")
@pytest.mark.parametrize("stage", ["loading", "compiling"])
def test_ctrl_c_from_the_shell(tmp_path, stage):
    start = INTERRUPTIBLE + "from ponder.cli.entry import main; main()"
    command = [sys.executable, "-c", start, "sample", "Hello", "--max-new-tokens", "400"]
    command += ["--json", str(tmp_path / "out.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while stage not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1.0)  # into the middle of the stage
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "ponder: interrupted"
    assert not stdout and not list(tmp_path.iterdir())
