"""What vLLM computes with packed weights is what transformers computes with the weights that fp8pack unpacks."""

from pathlib import Path

import pytest
import torch
from checkpoints import DEMO
from in_vllm.cases import RUNS
from in_vllm.conftest import Verb, run
from in_vllm.table import Table

pytestmark = pytest.mark.filterwarnings("ignore")


def expected_logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """The log probabilities of transformers, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)


@pytest.fixture(scope="session")
def tokens() -> list[int]:
    """The first tokens of the held-out text."""
    from transformers import AutoTokenizer

    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:400]
    found: list[int] = AutoTokenizer.from_pretrained(DEMO)(text).input_ids[:64]
    return found


@pytest.mark.parametrize(("family", "way"), RUNS)
def test_logprobs_are_those_of_the_unpacked_weights(
    family: str, way: str, pack: Verb, table: Table, tokens: list[int], tmp_path: Path
) -> None:
    from in_vllm.engine import logprobs

    pack(family, way)
    run("unpack", tmp_path / "out", "-o", tmp_path / "unpacked")
    found, expected = logprobs(tmp_path / "out", tokens), expected_logprobs(tmp_path / "unpacked", tokens)
    centered = expected - expected.mean(-1, keepdim=True)
    difference = (found - expected) - (found - expected).mean(-1, keepdim=True)
    assert difference.norm() / centered.norm() < RUNS[family, way]
    table.ran(family, way)
