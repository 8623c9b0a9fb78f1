"""The libraries that will read the files: transformers and compressed-tensors, on the demo model."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import DEMO

import fp8pack

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Other people's deprecations are not our errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def our_dequantized_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the BF16 architecture with the weights that load_packed dequantizes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    loaded = fp8pack.load_packed(folder)
    state = {n: t.dequantize() if isinstance(t, fp8pack.PackedTensor) else t for n, t in loaded.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    with torch.no_grad():
        return model(tokens).logits.float()


def tokens_of_heldout(length: int = 128) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:2000]
    return tokenizer(text, return_tensors="pt").input_ids[:, :length]


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC"])
def test_transformers_computes_what_our_dequantized_weights_compute(scheme: str, tmp_path: Path) -> None:
    if scheme == "FP8_DYNAMIC":
        pytest.importorskip("compressed_tensors")
    fp8pack.pack(DEMO, tmp_path / "out", scheme=scheme)
    tokens = tokens_of_heldout()
    options = (
        {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)} if scheme == "FP8_BLOCK" else {}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, **options)
    with torch.no_grad():
        logits = model(tokens).logits.float()
    expected = our_dequantized_logits(tmp_path / "out", tokens)
    assert torch.isfinite(logits).all()
    if scheme == "FP8_BLOCK":
        torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.25)
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


def test_perplexity_of_the_packed_demo_model_stays_near_that_of_bf16(tmp_path: Path) -> None:
    fp8pack.pack(DEMO, tmp_path / "out")
    tokens = tokens_of_heldout(256)
    expected = our_dequantized_logits(tmp_path / "out", tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    with torch.no_grad():
        reference = model(tokens).logits.float()
    losses = [
        torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item() for logits in (expected, reference)
    ]
    assert abs(losses[0] - losses[1]) < 0.05
    assert losses[1] < 5.0
