"""Check every model type of the installed transformers, and write docs/families.md.

python tests/families/run_families.py            every type, about an hour on two cores
python tests/families/run_families.py llama t5   some types, written to the terminal
"""

import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from families.check_family import SCHEMES, Family, NotRun, NotSaved, Outcome
from families.tiny_models import make_tiny, model_types
from transformers.models.llama import modeling_llama

import fp8pack
from fp8pack.errors import Fp8PackError

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
SECONDS = 300  # for one model type
SHARED = (modeling_llama, fp8pack.pack, fp8pack.unpack)  # imported once, before the processes are forked


class Row(NamedTuple):
    """A model type: its class, and for each scheme what happened, or why nothing could."""

    model_type: str
    cls: str
    outcomes: dict[str, Outcome | str]


def check_type(model_type: str) -> Row:
    """Check one model type under every scheme."""
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        model = make_tiny(model_type)
    except Exception as error:  # whatever a class raises that wants a package, or values of its own
        return Row(model_type, "", dict.fromkeys(SCHEMES, f"not built: {type(error).__name__}"))
    with tempfile.TemporaryDirectory() as place:
        try:
            family = Family(model, model_type, Path(place))
        except NotSaved:
            return Row(model_type, "", dict.fromkeys(SCHEMES, "not saved: transformers does not load its own files"))
        return Row(model_type, type(model).__name__, {scheme: _check(family, scheme) for scheme in SCHEMES})


def _check(family: Family, scheme: str) -> Outcome | str:
    try:
        return family.check(scheme)
    except NotRun:
        return "not run: it takes more than text"
    except Fp8PackError as error:
        return f"refused: {str(error).partition(';')[0]}"


def results(types: list[str]) -> Iterator[Row]:
    """Yield a row for each type, in order."""
    with get_context("fork").Pool(maxtasksperchild=1) as pool:
        yield from pool.imap(check_type, types)


def page(rows: list[Row]) -> str:
    """Return the text of docs/families.md."""
    built = [row for row in rows if row.cls]
    lines = [
        "# Families",
        "",
        "What becomes of every model type that transformers has. Each is built as a tiny model with random",
        "weights, packed, and loaded by `from_pretrained`: once with FP8 linears, as on a GPU, and once with",
        "`dequantize=True`. Every weight is compared with the output of `fp8pack unpack`, and that with the",
        "model. `make test-families` writes this page.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, a CPU. {len(built)} of {len(rows)}"
        " model types can be built; the others",
        "want a package or values of their own.",
        "",
        "- **packed as expected**: at least 95 % of the linears and experts that policy and shape allow are",
        "  FP8, or `pack` warns and names what stays.",
        "- **verdict holds**: `fp8pack` said yes and every weight was right both ways, or no and one was not.",
        "",
        "| scheme | types | packed as expected | loads | does not load | not known | verdict holds |",
        "|---|---|---|---|---|---|---|",
    ]
    for scheme in SCHEMES:
        found = [outcome for row in built if isinstance(outcome := row.outcomes[scheme], Outcome)]
        counts = Counter(outcome.loads for outcome in found)
        expected = sum(outcome.packed >= 0.95 or outcome.warned for outcome in found)
        unknown = sum(outcome.verdict is None for outcome in found)
        holds = sum(outcome.honest for outcome in found)
        cells = (f"{expected} of {len(found)}", counts[True], counts[False], unknown, f"{holds} of {len(found)}")
        lines.append(f"| {scheme} | {len(found)} | {' | '.join(map(str, cells))} |")
    lines += ["", "| model type | class | " + " | ".join(SCHEMES) + " |", "|---|---|" + "---|" * len(SCHEMES)]
    lines += [
        f"| {row.model_type} | {row.cls} | {' | '.join(_cell(row.outcomes[scheme]) for scheme in SCHEMES)} |"
        for row in built
    ]
    return "\n".join(lines) + "\n"


def _cell(outcome: Outcome | str) -> str:
    if isinstance(outcome, str):
        return outcome.replace("|", "/")
    said = {True: "loads", False: f"no: {outcome.reason}", None: "not known"}[outcome.verdict]
    return said if outcome.honest else f"**{said}, which is wrong**"


def main() -> int:
    """Write the page, or some rows to the terminal; the exit status says whether every verdict holds."""
    types = sys.argv[1:] or model_types()
    rows = list(results(types))
    text = page(rows)
    if sys.argv[1:]:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")
        print("\n".join(text.splitlines()[:24]))
    outcomes = [outcome for row in rows for outcome in row.outcomes.values() if isinstance(outcome, Outcome)]
    wrong = [outcome for outcome in outcomes if not outcome.honest or outcome.unpacked]
    print("\n".join(str(outcome) for outcome in wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
