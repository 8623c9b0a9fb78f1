"""Fuzz every parser in turn, and print how many inputs each was given: `make fuzz SECONDS=600`.

The corpora stay in build/fuzz/, so that the next run goes on where this one stopped; a finding is kept there, too.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from fuzz.make_corpus import make_corpus

HERE = Path(__file__).parent
INCLUDE = HERE.parents[1] / "fp8pack" / "_data" / "include"
SANITIZED = ("-std=c++17", "-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined")


def main() -> int:
    """Return 1 if there is a finding."""
    parser = argparse.ArgumentParser(description="Fuzz every parser, for so many seconds each.")
    parser.add_argument("folder", type=Path, help="where corpora and findings stay")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--runs", type=int, default=-1, help="at most so many inputs for each")
    parser.add_argument("--only", action="append", help="one target; repeat for more")
    asked = parser.parse_args()
    findings = 0
    print(f"{'target':12} {'inputs':>10} {'findings':>9}", flush=True)
    for name, seeds in make_corpus().items():
        if asked.only and name not in asked.only:
            continue
        corpus = asked.folder / "corpus" / name
        corpus.mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(seeds):
            (corpus / f"seed-{i}").write_bytes(seed)
        command = [sys.executable, str(HERE / "fuzz_target.py"), name]
        if name == "cpp":
            command = [str(asked.folder / "fuzz_header")]
            subprocess.run(
                ["clang++", *SANITIZED, "-I", str(INCLUDE), str(HERE / "fuzz_header.cpp"), "-o", *command], check=True
            )
        limits = [f"-max_total_time={asked.seconds}", f"-runs={asked.runs}", f"-artifact_prefix={asked.folder}/{name}-"]
        ended = subprocess.run(
            [*command, *limits, str(corpus)], capture_output=True, text=True, errors="replace", check=False
        )
        (asked.folder / f"{name}.log").write_text(ended.stderr)
        counts = re.findall(r"^(?:Done |#)(\d+)", ended.stderr, re.MULTILINE)
        findings += ended.returncode != 0
        print(f"{name:12} {counts[-1] if counts else 0:>10} {int(ended.returncode != 0):9}", flush=True)
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
