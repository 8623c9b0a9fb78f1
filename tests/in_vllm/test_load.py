"""What fp8pack packs, vLLM's loader puts where vLLM computes with it: byte for byte, or our verdict says no."""

import re
from pathlib import Path

import pytest
from in_vllm.cases import CASES
from in_vllm.conftest import Verb
from in_vllm.table import Table

pytestmark = pytest.mark.filterwarnings("ignore")

# What a CPU has no kernel for, and nothing in plain torch stands in for: the weights were loaded before.
NO_KERNEL = re.compile(r"|_C::static_scaled_fp8_quant\(\).*|Unsupported FP8 MoE backend: NONE", re.DOTALL)


@pytest.mark.parametrize(("family", "way"), CASES)
def test_the_verdict_is_what_the_loader_does(family: str, way: str, pack: Verb, table: Table, tmp_path: Path) -> None:
    """Loads: every parameter has the bytes of the files, every tensor of the files is in one, none was left unset."""
    from in_vllm.engine import load
    from in_vllm.layout import differences, read

    verdict = pack(family, way)
    try:
        loaded = load(tmp_path / "out")
    except Exception as error:  # whatever the engine refuses with
        table.add(family, way, verdict, refused=error)
        assert verdict["loads"] is False, error
        return
    found = list(differences(loaded, read(tmp_path / "out")))
    table.add(family, way, verdict, lost=found)
    assert NO_KERNEL.fullmatch(loaded.problem), loaded.problem
    assert (verdict["loads"] is True) is (not found), found
