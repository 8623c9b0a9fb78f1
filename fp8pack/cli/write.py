"""What the commands that write a checkpoint do once it is prepared."""

import json

from fp8pack.cli.output import emit, say
from fp8pack.packing.facts import write_facts
from fp8pack.packing.prepare import Prepared
from fp8pack.packing.write import carry_out
from fp8pack.report.progress import PACKING, showing_progress
from fp8pack.report.summary import plan_lines, result_lines


def write(prepared: Prepared, *, dry_run: bool, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Say what is planned, carry it out unless it is a dry run, and say what was done."""
    if not quiet:
        say(*plan_lines(write_facts(prepared, every_tensor=verbose)))
    result = None
    if not dry_run:
        with showing_progress(PACKING, quiet) as on_progress:
            result = carry_out(prepared, on_progress)
    facts = write_facts(prepared, result, every_tensor=dry_run and as_json)
    if not quiet:
        say(*result_lines(facts))
    if as_json:
        emit(json.dumps(facts, indent=2, ensure_ascii=False))
    elif not dry_run:
        emit(facts["output"])
