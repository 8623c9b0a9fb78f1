"""A console for stdout: lines and tables, safe to print whatever a file contains."""

from rich.console import Console
from rich.text import Text

from fp8pack.report.text import printable

_WIDTH = 160  # of a table that goes to a file or a pipe


class _Console(Console):
    """Leaves the error of a closed pipe to the caller."""

    def on_broken_pipe(self) -> None:
        """Raise the error that rich is about to turn into an exit."""
        raise  # noqa: PLE0704  (it is called where the error is handled)


def make_console(names: list[str]) -> Console:
    """Return a console for stdout, wide enough for these names and the other columns, unless it is a terminal."""
    console = _Console(highlight=False, soft_wrap=False)
    if console.is_terminal:
        return console
    return _Console(highlight=False, width=max(_WIDTH, max(map(len, names), default=0) + 100))


def print_line(console: Console, line: str) -> None:
    """Print a line of text as it is, with control characters from files escaped."""
    console.print(Text(printable(line)), soft_wrap=True)
