"""A sample of the points that `make test-faults` checks: calls that fail from outside, in every command."""

import shutil

import pytest
from faults.run_faults import COMMANDS, check_all

SAMPLED = ("pack --overwrite", "convert")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_call_that_fails_leaves_no_output_or_a_whole_one_and_the_same_command_ends_in_the_same_root() -> None:
    found = check_all(every=127, commands=[command for command in COMMANDS if command.name in SAMPLED])
    assert {point: answer for point, answer in found.items() if answer not in ("", "-")} == {}
    assert sum(answer == "" for answer in found.values()) >= 12
