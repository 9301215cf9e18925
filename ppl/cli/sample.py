"""What `ponder sample` does: load a model, run a kernel with its progress shown, and report."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ponder
from ponder.cli.checks import Failure
from ponder.cli.interrupts import unwind_on_interrupt
from ponder.cli.settings import EVIDENCE, METHODS, STDOUT, Outputs, Settings, Timings

if TYPE_CHECKING:
    from ponder.cli.progress import ProgressLine

__all__ = ["run"]

NO_POSTERIOR = 3
"""Exit code where every particle has weight zero: no trace that was drawn satisfies the evidence."""

_OUT_OF_MEMORY = "out of memory: use fewer --particles, a smaller --max-new-tokens, or --dtype bfloat16"

_ALL_DEAD = (
    "every particle has weight zero (log evidence -inf), so there is no posterior to show; try more "
    "--particles, a larger --max-new-tokens, or a constraint that is easier to meet"
)


def run(settings: Settings, outputs: Outputs) -> None:
    """Sample, print the posterior, and write the files that were asked for.

    Raises:
        Failure: something that the user can mend.
    """
    from ponder.cli.compilation import keep_compilations
    from ponder.cli.progress import ProgressLine
    from ponder.cli.report import print_posterior, write_json, write_plot

    unwind_on_interrupt()
    with ProgressLine() as line, _warnings_shown(line):
        keep_compilations()
        line.stage(f"loading {settings.model}")
        start = time.perf_counter()
        with _explained(f"--model {settings.model}"):
            lm = _load(settings, line)
        load_seconds = time.perf_counter() - start
        settings = dataclasses.replace(settings, chat=_wants_chat(settings, lm.tokenizer))
        with _explained():
            algorithm = METHODS[settings.method].build(_program(settings, lm), settings)
        line.stage("compiling")
        with _limits_explained():
            posterior, timings = _draw(algorithm, settings, line, load_seconds)
    # The files first: whoever reads the table may close the pipe.
    writers = {
        "save": posterior.save,
        "json": lambda path: write_json(path, settings, posterior, timings),
        "plot": lambda path: write_plot(path, posterior),
    }
    for name, write in writers.items():
        path = getattr(outputs, name)
        if path is not None:
            with _explained(f"--{name} {path}"):
                write(path)
    if bool(posterior.stats.degenerate):
        raise Failure(_ALL_DEAD, NO_POSTERIOR)
    print_posterior(posterior, timings, stderr=outputs.json == STDOUT)


def _load(settings: Settings, line: ProgressLine) -> Any:
    return ponder.models.load(settings.model, dtype=settings.dtype, progress=line.fraction)


def _program(settings: Settings, lm: Any) -> Any:
    given = [(make, getattr(settings, name)) for name, make in EVIDENCE.items()]
    potential = None
    for factor in [make(value) for make, value in given if value is not None]:
        potential = factor if potential is None else potential * factor
    return ponder.Generation(
        lm,
        [{"role": "user", "content": settings.prompt}] if settings.chat else settings.prompt,
        max_new_tokens=settings.max_new_tokens,
        potential=potential,
        temperature=settings.temperature,
        stop=settings.stop,
        include_stop=not settings.cut_stop,
        overflow="force_eos" if settings.force_eos else "truncate",
    )


def _wants_chat(settings: Settings, tokenizer: Any) -> bool:
    if tokenizer is None:
        raise Failure(
            f"--model {settings.model}: it has no tokenizer, so it cannot read a prompt", exit_code=2
        )
    has_template = getattr(tokenizer, "has_chat_template", False)
    return has_template if settings.chat is None else settings.chat


def _draw(algorithm: Any, settings: Settings, line: ProgressLine, load_seconds: float) -> tuple[Any, Timings]:
    """Run the algorithm; the callback after each slice of steps is also the stopwatch.

    The first slice compiles everything, so that its end splits compilation from steady work. Each callback
    comes after the device has finished the slice, hence its time is real work and not only dispatch.
    """
    import jax

    marks: list[tuple[int, float]] = []

    def on_progress(progress: Any) -> None:
        marks.append((progress.step, time.perf_counter()))
        line.update(progress, _live_rate(progress, marks))

    # Short runs report every step, to have something to time; on long ones fewer calls cost less.
    every = 1 if settings.max_new_tokens <= 32 else 4
    start = time.perf_counter()
    posterior = algorithm.run(jax.random.key(settings.seed), progress=on_progress, progress_every=every)
    (first_step, first_time), (last_step, last_time) = marks[0], marks[-1]
    rate = None
    drawn = posterior.stats.num_tokens
    if drawn is not None and last_time > first_time:
        later_tokens = int(drawn[first_step:last_step].sum())
        rate = later_tokens / (last_time - first_time)
    return posterior, Timings(load_seconds, first_time - start, last_time - first_time, rate)


def _live_rate(progress: Any, marks: list[tuple[int, float]]) -> float | None:
    """Estimate tokens a second from the last two slices; finished particles draw none."""
    if len(marks) < 2:
        return None
    (step_before, before), (step, now) = marks[-2:]
    return (progress.num_particles - progress.num_done) * (step - step_before) / (now - before)


@contextmanager
def _warnings_shown(line: ProgressLine) -> Iterator[None]:
    """Show warnings as lines above the progress, without file names and source."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        line.warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.filterwarnings("ignore", message="every particle has weight zero")  # it is an error here
        warnings.showwarning = show
        yield


@contextmanager
def _explained(subject: str = "") -> Iterator[None]:
    """Turn the library's errors about its input into a `Failure`; a closed pipe is not one."""
    prefix = f"{subject}: " if subject else ""
    try:
        yield
    except BrokenPipeError:
        raise
    except FileNotFoundError as error:
        raise Failure(f"{prefix}{error.strerror or error}", exit_code=2) from error
    except (ValueError, TypeError) as error:
        raise Failure(f"{prefix}{error}", exit_code=2) from error
    except OSError as error:
        # Without the name in it, which may be that of a temporary file.
        raise Failure(f"{prefix}{error.strerror or error}") from error
    except (ImportError, NotImplementedError) as error:
        raise Failure(f"{prefix}{error}") from error


@contextmanager
def _limits_explained() -> Iterator[None]:
    """Tell what limit a run met; its other errors are bugs and keep their traceback."""
    import jax

    from ponder.potentials.grammar_matching import EngineLimitError

    try:
        yield
    except EngineLimitError as error:
        raise Failure(f"--grammar: {error}") from error
    except MemoryError as error:
        raise Failure(_OUT_OF_MEMORY) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Failure(_OUT_OF_MEMORY) from error
