"""`write`: the common part of commands that write a checkpoint."""

from fp8pack.cli.output import emit, emit_document, say
from fp8pack.packing.metadata import CardSection
from fp8pack.packing.prepare import Prepared
from fp8pack.packing.result import make_result
from fp8pack.packing.write import carry_out, check
from fp8pack.report.progress import PACKING, showing_progress
from fp8pack.report.summary import plan_lines, result_lines


def write(
    prepared: Prepared,
    *,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    card_section: CardSection | None = None,
) -> None:
    """Print the plan, carry it out unless it is a dry run, and print the result."""
    if not quiet:
        say(*plan_lines(make_result(prepared, every_tensor=verbose)))
    written = None
    if dry_run:
        check(prepared)
    else:
        with showing_progress(PACKING, quiet) as on_progress:
            written = carry_out(prepared, on_progress, card_section)
    result = make_result(prepared, written, every_tensor=dry_run)
    if not quiet:
        say(*result_lines(result))
    if as_json:
        emit_document(result)
    elif not dry_run:
        emit(str(result.output))
