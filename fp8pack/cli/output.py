"""Printing to stdout and stderr, and signals that end the process."""

import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TypeVar

import typer

from fp8pack.documents import Document
from fp8pack.errors import Fp8PackError, RecipeError
from fp8pack.report.text import printable

Shown = TypeVar("Shown", bound=Document)


class Signalled(BaseException):
    """A signal ended the command; not an Exception, so that `except Exception` does not catch it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class _Messages(TextIOWrapper):
    """Stderr that may be full: text that cannot be written is lost, and the work continues."""

    def write(self, text: str) -> int:
        """Write if possible."""
        with suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        with suppress(OSError):
            super().flush()


def open_streams() -> None:
    """Make stdin, stdout and stderr safe to use if one of them is closed: no file of ours may get its number.

    Writing to a closed stdout still fails, so that it is noticed; text for a closed stderr is lost.
    """
    for fd, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest free number: this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is sys.__stderr__:  # not replaced by a caller
        messages = os.fdopen(2, "wb", closefd=False)
        sys.stderr = _Messages(messages, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def drop_stdout() -> None:
    """Discard unwritten stdout; otherwise Python would try again at exit and fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


@contextmanager
def printing() -> Iterator[None]:
    """Print data on stdout; if its reader is closed, end as SIGPIPE would end the process.

    Raises:
        Fp8PackError: stdout is closed or full.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        drop_stdout()
        if error.errno == errno.EPIPE:
            raise Signalled(signal.SIGPIPE) from None
        raise Fp8PackError(f"stdout cannot be written: {str(error.strerror).lower()}") from None


def emit(text: str) -> None:
    """Print a text as data; raises as `printing` does."""
    with printing():
        typer.echo(text)


def emit_document(document: Document) -> None:
    """Print a result on stdout, as JSON."""
    emit(json.dumps(document.to_dict(), indent=2, ensure_ascii=False))


def show(
    found: Shown,
    print_found: Callable[[Shown], None],
    *,
    as_json: bool,
    as_markdown: bool = False,
    html: Path | None = None,
) -> None:
    """Print a result on stdout, for people, as JSON or as Markdown; write its page first if there is to be one."""
    if html is not None:
        from fp8pack.report.page.write import html_report, write_page

        write_page(html, html_report(found, shlex.join(["fp8pack", *sys.argv[1:]])))
    if as_json:
        emit_document(found)
    elif as_markdown:
        from fp8pack.report.markdown import markdown_report

        emit(markdown_report(found).rstrip("\n"))
    else:
        with printing():
            print_found(found)


def check_output(html: Path | None, *, as_json: bool, as_markdown: bool) -> None:
    """Raise RecipeError for a page that cannot be written, and for two formats on stdout."""
    if as_json and as_markdown:
        raise RecipeError("JSON and Markdown would both be printed on stdout", "leave one out")
    if html is not None:
        from fp8pack.report.page.write import check_page

        check_page(html)


def say(*lines: str) -> None:
    """Print lines on stderr, with control characters from files escaped."""
    print("\n".join(map(printable, lines)), file=sys.stderr)
