"""What goes to stdout, what goes to stderr, and what ends the process from outside."""

import json
import os
import signal
import sys

import typer

from fp8pack.documents import Document
from fp8pack.report.text import printable


class Signalled(BaseException):
    """A signal ended the command; not an Exception, so that nothing on the way swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def emit(text: str) -> None:
    """Print data on stdout; if its reader went away, end as SIGPIPE would end the process."""
    try:
        typer.echo(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Signalled(signal.SIGPIPE) from None


def emit_document(document: Document) -> None:
    """Print a result on stdout, as JSON."""
    emit(json.dumps(document.to_dict(), indent=2, ensure_ascii=False))


def say(*lines: str) -> None:
    """Print lines on stderr, with control characters from files escaped."""
    print("\n".join(map(printable, lines)), file=sys.stderr)
