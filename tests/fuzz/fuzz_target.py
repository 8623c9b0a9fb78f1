"""Fuzzing by coverage, with atheris: `make fuzz`, or, with tests/ on the path,

    python tests/fuzz/fuzz_target.py TARGET -max_total_time=60 -runs=1000000 CORPUS

What follows the target goes to libFuzzer. An input that takes more than 2 s, or memory beyond its limit, is a finding.
"""

import sys

import atheris

with atheris.instrument_imports(include=["fp8pack"]):
    from fuzz.targets import TARGETS


def main() -> None:
    """Run a target until libFuzzer ends."""
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup([sys.argv[0], "-timeout=2", "-rss_limit_mb=1024", *sys.argv[1:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
