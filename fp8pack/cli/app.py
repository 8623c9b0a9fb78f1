"""The Typer application; it prints errors as sentences and exits with their exit codes."""

import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, NoReturn

import typer

from fp8pack import __version__
from fp8pack.cli.calibrate import calibrate
from fp8pack.cli.convert import convert
from fp8pack.cli.diff import diff
from fp8pack.cli.env import env
from fp8pack.cli.eval import evaluate
from fp8pack.cli.inspect import inspect
from fp8pack.cli.merge import merge
from fp8pack.cli.output import Signalled, drop_stdout, open_streams, say
from fp8pack.cli.pack import pack
from fp8pack.cli.recommend import recommend
from fp8pack.cli.unpack import unpack
from fp8pack.cli.verify import verify
from fp8pack.errors import Fp8PackError
from fp8pack.machine import check_system

app = typer.Typer(
    name="fp8pack",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(calibrate)
app.command()(merge)
app.command()(pack)
app.command()(unpack)
app.command()(convert)
app.command()(inspect)
app.command()(diff)
app.command()(verify)
app.command("eval")(evaluate)
app.command()(recommend)
app.command()(env)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fp8pack {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Pack BF16 checkpoints into FP8: offline, without the model's class, in constant memory."""


def main() -> NoReturn:
    """Run the command line; an expected failure is printed as one line on stderr and exits with its exit code."""
    open_streams()
    try:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # which nohup sets
                signal.signal(signum, _interrupt)
        check_system()
        app()
    except Fp8PackError as error:
        if os.environ.get("FP8PACK_DEBUG") == "1":
            traceback.print_exc()
        say(f"fp8pack: {error.command_line}")
        sys.exit(error.exit_code)
    except OSError as error:  # an unexpected failure of a disk or a stream
        if os.environ.get("FP8PACK_DEBUG") == "1":
            traceback.print_exc()
        drop_stdout()
        say(f"fp8pack: {error.filename or 'input or output'}: {str(error.strerror or error).lower()}")
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:  # also of a thread that finds no room for its stack
        if isinstance(error, RuntimeError) and "start new thread" not in str(error):
            raise
        say("fp8pack: this process is not given enough memory: raise its limit (ulimit -d, ulimit -v)")
        sys.exit(1)
    except Signalled as signalled:
        if signalled.signum != signal.SIGPIPE:
            say("fp8pack: interrupted; finished work is kept, the same command continues")
        sys.exit(128 + signalled.signum)
    sys.exit(0)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signum, signal.SIG_DFL)
    raise Signalled(signum)
