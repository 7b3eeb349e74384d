"""The command `npdrt`: thin commands over the library, each imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from npdrt import __version__, blas, launch
from npdrt.errors import Error, known

COMMANDS = {
    "train": "Train a network, or go on with a run.",
    "reproduce": "A figure of the papers: their numbers next to ours.",
    "perturb": "Loss and gradient along a run's layerwise gradient.",
    "sweep": "Every run of a recipe, resumable.",
    "fid": "How far generated images are from real ones.",
    "distance": "Deep relative trust and bounds between two checkpoints.",
    "audit": "Check an implementation of an update rule; name its dialect.",
    "audit-gradients": "Our gradients against autograd, PyTorch and JAX.",
    "vectors": "Conformance vectors: list, export, verify a response.",
    "explain": "The array calls of one training step, or where two differ.",
    "eval": "Loss and accuracy of a run on a data set.",
    "predict": "Predictions of a run for new examples.",
    "show": "What is in a file or run, and how it was made.",
    "verify": "Repeat a portable run, and compare every bit.",
    "export": "Parameters as npz or safetensors, or the history as CSV.",
    "convert": "A file of format version 1 in today's format.",
    "sample": "Images of a trained generator, as a grid.",
    "plot": "A picture of a run, a study or slices.",
    "data": "List, fetch and verify data sets.",
    "doctor": "What npdrt found on this machine, and what to change.",
    "bench": "The speed of this machine, and of a training step on it.",
    "completion": "Print the completion script of a shell.",
}


class Failure(click.ClickException):
    """An npdrt error as the command line shows it: one message, and the error's exit code."""

    def __init__(self, error: BaseException):
        from npdrt.cli.common import printable  # here: it imports NumPy

        super().__init__(printable(error))
        self.exit_code = getattr(error, "exit_code", 1)  # type: ignore[misc]  # Click's is a class variable


class Commands(click.Group):
    """The top level: lists commands without importing them, and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"npdrt.cli.{name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that `args` name; an unknown one gets a suggestion."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            close = get_close_matches(args[0], COMMANDS, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in the help, from their one-line descriptions."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; an npdrt error, or one of the system, becomes message and exit code."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # Click handles it: the reader of the output has gone
        except (Error, OSError, MemoryError, OverflowError) as error:
            if isinstance(error, OSError) and error.filename is None:
                from npdrt.cli.common import give_up_output

                give_up_output()
            raise Failure(known(error)) from error
        except KeyboardInterrupt:
            ctx.exit(130)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="npdrt")
def cli() -> None:
    """NumPy deep relative trust: train, inspect and check networks on plain arrays.

    Exit codes: 0 done; 1 a check failed or training diverged; 2 usage; 3 a file was refused;
    4 the environment lacks something (GPU, extra, data); 5 the disk is full, read-only or failed;
    129, 130 and 143 stopped by a signal after saving.
    """


def import_nothing_from_here() -> None:
    """Import no module from the folder of the console script, nor any from the working directory
    in the processes that this one starts: those inherit PYTHONSAFEPATH, which is Python's -P.

    `python -m npdrt` keeps the working directory, which Python put on its path.
    """
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    script = str(Path(sys.argv[0]).resolve().parent)
    if not sys.flags.safe_path and sys.path[:1] == [script]:
        del sys.path[0]


def open_standard_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr (2>&-, a daemon) empty ones.

    Else the next file that is opened would get their number, and messages would be written to it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def show_warnings() -> None:
    """Show warnings of npdrt's modules as one line on stderr, without the line of code."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if category is not UserWarning:
            usual(message, category, *place, **more)
            return
        from npdrt.cli.common import warn

        warn(str(message))

    warnings.showwarning = show


def main() -> None:
    """Entry point of the console script and of `python -m npdrt`."""
    import_nothing_from_here()
    open_standard_streams()
    show_warnings()
    blas.choose_kernels()  # here, because a command imports NumPy as soon as it is looked up
    try:
        cli(prog_name="npdrt")
    except BaseException as error:
        launch.give_up(error)
        raise
