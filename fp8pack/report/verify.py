"""What `verify` prints: a line for each difference, and what was compared."""

from fp8pack.reading.verification import Verification
from fp8pack.report.console import make_console, print_line
from fp8pack.units import format_seconds, format_size

_MAX_OTHERS = 5


def print_verification(found: Verification) -> None:
    """Print a verification to stdout."""
    console = make_console([])
    for difference in found.repaired:
        print_line(console, f"repaired {difference}")
    for difference in found.differences:
        print_line(console, f"differs  {difference}")
    others = list(found.other_files[:_MAX_OTHERS])
    more = len(found.other_files) - len(others)
    others += [f"and {more} more"] if more else []
    if others:
        print_line(console, f"note     not in fp8pack.json: {', '.join(others)}")
    for unknown in found.unknown:
        print_line(console, f"note     {unknown}")
    rate = f"{format_size(found.nbytes / max(found.seconds, 1e-9))}/s"
    counted = f"{found.num_files} files, {found.num_tensors} of {found.all_tensors} tensors"
    read = f"{format_size(found.nbytes)} in {format_seconds(found.seconds)}, {rate}"
    print_line(console, f"compared {counted}: {read}")
    if found.root is not None:
        print_line(console, f"root     {found.root}")
    count = len(found.differences)
    verdict = "no difference" if found.ok else f"{count} difference{'s' if count > 1 else ''}"
    print_line(console, f"result   {verdict}")
