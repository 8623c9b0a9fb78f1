"""`evaluate` of what other tools wrote, against the same weights in floats."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import fp8pack

FIXTURES = Path(__file__).parents[1] / "interop" / "fixtures"
FP8 = {
    "autoround-fp8_static": "static",
    "llmcompressor-fp8_block": "dynamic",
    "llmcompressor-moe": "dynamic",
    "llmcompressor-mxfp8": "dynamic",
    "modelopt-moe": "static",
    "quark-ptpc_fp8": "dynamic",
    "torchao-weight-only": "none",
}
OTHERS = ("llmcompressor-nvfp4", "llmcompressor-w4a16", "modelopt-nvfp4_mixed", "transformers-gpt_oss")


def make_tokenizer() -> Any:
    """A word each for the sixteen tokens of the fixtures."""
    words = {"<end>": 0, "<unk>": 1, **{word: i + 2 for i, word in enumerate("abcdefghijklm")}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


@pytest.mark.parametrize("name", [*FP8, *OTHERS])
def test_weights_of_another_tool_are_those_of_unpack(name: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / name, tmp_path / "theirs")
    fp8pack.unpack(tmp_path / "theirs", tmp_path / "floats", dtype="float32")
    for folder in ("theirs", "floats"):
        make_tokenizer().save_pretrained(tmp_path / folder)
    (tmp_path / "text.jsonl").write_text('{"text": "a b c d e f g h"}\n{"text": "k l m a a b"}\n')
    given = {"against": tmp_path / "floats", "text": str(tmp_path / "text.jsonl")}
    found = fp8pack.evaluate(tmp_path / "theirs", **given)
    weights = fp8pack.evaluate(tmp_path / "theirs", activations="none", **given).checkpoints[0]
    assert weights.kl.value < 1e-12
    assert found.checkpoints[0].activations == FP8.get(name, "none")
    assert (found.checkpoints[0].kl.value > 1e-7) == (FP8.get(name, "none") != "none")
    assert any("is not FP8 alone" in note for note in found.notes) == (name in OTHERS)
