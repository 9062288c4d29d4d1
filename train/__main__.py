"""The command `gdn`: train, sweep, report, coord-check, show-rules, compile."""

import contextlib
import ctypes
import dataclasses
import io
import itertools
import json
import logging
import os
import pathlib
import re
import select
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from train.aot import CompileOptions
from train.config import KeepOptions, ModelOptions, OptimizerOptions
from train.coord_run import CoordOptions
from train.data import DataConfig
from train.faults import RunFailedError, in_a_line
from train.interrupts import Stopped, leave
from train.mesh import MeshOptions
from train.processes import tell_failure
from train.show_rules import ShowRulesOptions
from train.sweep_options import SweepOptions
from train.train_run import TrainOptions


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """Train one model; run it again to go on where it stopped."""

    run: Annotated[TrainOptions, tyro.conf.arg(name="")]
    model: ModelOptions = ModelOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    data: DataConfig = DataConfig()
    keep: Annotated[KeepOptions, tyro.conf.arg(name="")] = KeepOptions()
    mesh: MeshOptions = MeshOptions()


@dataclasses.dataclass(frozen=True)
class SweepCommand:
    """Train every width x preset x learning rate x seed, then report whether the optimum transfers."""

    sweep: Annotated[SweepOptions, tyro.conf.arg(name="")]
    model: ModelOptions = ModelOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    data: DataConfig = DataConfig()


@dataclasses.dataclass(frozen=True)
class ReportCommand:
    """Judge the rows of a sweep: table, verdict, report.json, transfer.png."""

    directory: tyro.conf.Positional[pathlib.Path]
    """The sweep's --out."""


@dataclasses.dataclass(frozen=True)
class CoordCheckCommand:
    """Measure how activations, updates and gradients scale with width; exit code 1 when muP fails."""

    check: Annotated[CoordOptions, tyro.conf.arg(name="")]
    model: ModelOptions = ModelOptions(layers=2)
    optimizer: OptimizerOptions = OptimizerOptions()
    data: DataConfig = DataConfig(sequence_length=128, batch_size=4)


@dataclasses.dataclass(frozen=True)
class ShowRulesCommand:
    """Print what a parametrization does to each parameter of a model."""

    show: Annotated[ShowRulesOptions, tyro.conf.arg(name="")]
    model: ModelOptions = ModelOptions()
    optimizer: OptimizerOptions = OptimizerOptions()


@dataclasses.dataclass(frozen=True)
class CompileCommand:
    """Compile the train step for a TPU pod without one: memory, exchanges, and whether it fits (else exit code 1)."""

    compile: Annotated[CompileOptions, tyro.conf.arg(name="")]
    mesh: MeshOptions = MeshOptions()
    model: ModelOptions = ModelOptions()


type Command = (
    Annotated[TrainCommand, tyro.conf.subcommand("train")]
    | Annotated[SweepCommand, tyro.conf.subcommand("sweep")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report")]
    | Annotated[CoordCheckCommand, tyro.conf.subcommand("coord-check")]
    | Annotated[ShowRulesCommand, tyro.conf.subcommand("show-rules")]
    | Annotated[CompileCommand, tyro.conf.subcommand("compile")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line; exits with 2 on wrong input, 1 when a check or a run fails, 128 + n after signal n.

    Without ``arguments`` it runs those of the process, which then is ours to set up: jax has not started yet.
    """
    try:
        command = _parse(arguments)
        if arguments is None:
            _keep_freed_memory()
            if isinstance(command, SweepCommand):
                _one_cpu_device_per_core()
            if isinstance(command, SweepCommand | TrainCommand):
                from train.distributed import start_processes

                start_processes()
        code = _run(command)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # Python would complain at the end that it cannot write what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except ValueError as error:
        print(f"gdn: {error}", file=sys.stderr)
        code = 2
        if tell_failure(error):
            leave(code)
    except RunFailedError as error:
        print(f"gdn: {error}", file=sys.stderr)
        code = 1
        if tell_failure(error):
            leave(code)
    except Stopped as stopped:
        print(f"gdn: stopped by {stopped}; the same command goes on from here", file=sys.stderr)
        code = 128 + stopped.number
        leave(code)
    except KeyboardInterrupt:
        print("gdn: interrupted; the same command goes on from what was saved", file=sys.stderr)
        code = 130
        leave(code)
    except Exception as error:
        others_wait = tell_failure(error)
        said = in_a_line(error)
        if said is None:
            raise
        print(f"gdn: {said}", file=sys.stderr)
        code = 1
        if others_wait:
            leave(code)
    sys.exit(code)


def _nobody_reads() -> bool:
    """Whether the reader of what we print, `head` say, has gone."""
    poll = select.poll()
    # Asked for nothing, it tells of errors only.
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def _parse(arguments: Sequence[str] | None) -> Any:
    """The command; ValueError with one line where tyro would draw a box."""
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            words = list(sys.argv[1:] if arguments is None else arguments)
            if (folder := _tuned_by(words)) is not None:
                return _parse_tuned(words, folder)
            return tyro.cli(Command, prog="gdn", args=words, description=__doc__)
    except SystemExit as stop:
        if not stop.code:
            sys.stdout.flush()
            raise
        raise ValueError(_one_line(drawn.getvalue())) from None


def _tuned_by(words: Sequence[str]) -> pathlib.Path | None:
    """The sweep that a `gdn train` names, read off its words: what it leaves open is as there."""
    if words and words[0] == "train":
        for word, following in itertools.zip_longest(words, words[1:]):
            flag, equals, value = word.partition("=")
            if flag in ("--tuned-by", "--tuned_by") and (equals or following is not None):
                return pathlib.Path(value if equals else following)
    return None


def _parse_tuned(words: Sequence[str], folder: pathlib.Path) -> Any:
    from train.tuned import sweep_config, sweep_options

    config = sweep_config(folder)
    # Later words win, so the user's own --steps does.
    words = ["--steps", str(config["steps"]), *words[1:]]
    first = tyro.cli(Command, prog="gdn", args=["train", *words], description=__doc__)
    assert isinstance(first, TrainCommand), "that is the first word"
    model, optimizer, data = sweep_options(config, first.data)
    return tyro.cli(
        TrainCommand, prog="gdn train", args=words, default=TrainCommand(first.run, model, optimizer, data)
    )


def _one_line(box: str) -> str:
    """What tyro's box says, without its frame, the help of single options and the hint at --help."""
    sections, rule = [[]], re.compile("─{8}")
    for line in box.splitlines()[1:]:
        if rule.search(line):
            sections.append([])
        elif not (text := line.strip("│ ").rstrip()) or line.startswith("│" + " " * 9):
            continue
        else:
            sections[-1].append(text)
    kept = [" ".join(lines) for lines in sections if lines]
    kept = [text for text in kept if not text.startswith(("For full helptext", "Argument helptext"))]
    text = re.sub(r"Error parsing __tyro-dummy-inner__\.?", "", "; ".join(kept)).rstrip(".")
    return f"{text}. See gdn --help."


def _run(command: Any) -> int:
    from rich.console import Console

    # A path in brackets is no markup.
    console = Console(markup=False)
    match command:
        case ShowRulesCommand():
            from train.show_rules import show_rules

            shown = show_rules(command.show, command.model, command.optimizer.name)
            # One line a parameter: a narrow terminal breaks lines, it does not cut columns.
            Console(width=max(console.width, 132)).print(shown)
        case ReportCommand():
            return _report(command.directory, console)
        case SweepCommand():
            from train import processes
            from train.progress import SweepBar
            from train.sweep import run_sweep

            _keep_compilations()
            _quiet_orbax()
            if not processes.first():
                run_sweep(command.sweep, command.model, command.optimizer, command.data)
                return 0
            with SweepBar(console) as bar:
                run_sweep(command.sweep, command.model, command.optimizer, command.data, bar)
            return _report(command.sweep.out, console)
        case TrainCommand():
            from train import processes
            from train.train_run import run_training

            _keep_compilations()
            _quiet_orbax()
            summary = run_training(
                command.run,
                command.model,
                command.optimizer,
                command.data,
                say=lambda text: print(text, flush=True),
                keep=command.keep,
                mesh=command.mesh,
            )
            if summary["val_loss"] is not None and processes.first():
                print(f"validation loss {summary['val_loss']:.4f} after {summary['steps']} steps")
            return 1 if summary["diverged_at_step"] else 0
        case CompileCommand():
            from train.aot import compile_job, describe, plan

            report = compile_job(plan(command.compile, command.model, command.mesh))
            print(json.dumps(report, indent=1) if command.compile.json else "\n".join(describe(report)))
            return 0 if report["fits"] and not report["unplanned"] else 1
        case CoordCheckCommand():
            from train.coord_run import run_coord_check

            _keep_compilations()
            return run_coord_check(command.check, command.model, command.optimizer, command.data, console)
    return 0


def _report(directory: pathlib.Path, console: Any) -> int:
    from train.report import table, write_report

    report = write_report(directory)
    console.print(table(report))
    console.print(f"picture: {directory / 'transfer.png'}", soft_wrap=True)
    return 0


def _quiet_orbax() -> None:
    """When Orbax cannot write, it logs what it raises as well, with tracebacks: the user is told once.

    TensorStore then reports every array to an event loop that Orbax has closed, and prints that it cannot.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(
            lambda record: "orbax" not in record.pathname and "orbax" not in record.getMessage()
        )
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook


def _keep_freed_memory() -> None:
    """Freed memory stays with the process; elsewhere than under glibc, nothing is changed.

    On a CPU every step of XLA allocates its temporary buffers anew. glibc gives buffers of that size back to the
    kernel, which clears the pages again at the next step: 22 % of a step at width 256, 94 % of its system time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # Of malloc.h: M_ARENA_MAX (the main arena alone grows past 64 MB), M_MMAP_MAX, M_TRIM_THRESHOLD.
    for parameter, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):
        mallopt(parameter, value)


def _one_cpu_device_per_core() -> None:
    """On a CPU every core trains points of its own: a quarter faster than all cores on one small point."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    import jax

    # Beyond eight, memory for that many points at once is what a laptop lacks.
    jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, 8))


def _keep_compilations() -> None:
    """Compiled programs outlive the process, so that a sweep that goes on does not compile again."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "gdn" / "jax"))
    # With a bound on its size the cache is locked and written whole, so that a kill cannot leave half an entry.
    jax.config.update("jax_compilation_cache_max_size", 4 * 2**30)


if __name__ == "__main__":
    main()
