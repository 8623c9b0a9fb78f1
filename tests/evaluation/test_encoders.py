"""`evaluate_encoder` and `compare_models`: their numbers are those of a few lines of torch."""

import json
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from calibration.tiny_models import FAMILIES, make_model, make_tokenizer, randomize, save_model
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import fp8pack
from fp8pack.cli.app import app
from fp8pack.errors import BoundError, InputError, RecipeError
from fp8pack.evaluation.evaluate_encoder import spearman
from fp8pack.evaluation.pooling import read_pooling

SENTENCES = [
    "The quick brown fox jumps.",
    "It sees a lazy dog there.",
    "Zażółć gęślą jaźń, dwa razy.",
    "def add(a, b): return a",
    "0123456789 and 9876543210",
    "To be, or not to be, said he.",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of three sentences or lines each."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = (" ".join(SENTENCES[:3]), "\n".join(SENTENCES[3:]))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("bert_base"), tmp_path_factory.mktemp("bert") / "model")


def embeddings(folder: Path) -> np.ndarray:
    """Mean embeddings of the sentences, by transformers alone."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    rows = [make_tokenizer()(sentence, return_tensors="pt").input_ids for sentence in SENTENCES]
    with torch.no_grad():
        found = torch.stack([model(input_ids=row).last_hidden_state[0].mean(0) for row in rows]).double().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_embeddings_are_compared_as_a_script_does(bert: Path, texts: Path, tmp_path: Path) -> None:
    fp8pack.pack(bert, tmp_path / "out", scheme="FP8_DYNAMIC")
    fp8pack.unpack(tmp_path / "out", tmp_path / "back", dtype="float32")
    found = fp8pack.evaluate_encoder(tmp_path / "out", bert, text=str(texts), activations="none")
    (quality,) = found.checkpoints
    a, b = embeddings(bert), embeddings(tmp_path / "back")
    cosine = (a * b).sum(1)
    assert (found.kind, found.pooling, found.num_texts, found.num_documents) == ("embeddings", "mean", 6, 2)
    assert quality.cosine is not None
    assert quality.cosine.value == pytest.approx(cosine.mean(), abs=1e-6)
    assert quality.cosine_min == pytest.approx(cosine.min(), abs=1e-6)
    assert quality.worst[0].text == SENTENCES[int(cosine.argmin())]
    pairs = list(combinations(range(6), 2))
    ranks = [np.argsort(np.argsort([m[i] @ m[j] for i, j in pairs])) for m in (a, b)]
    assert quality.rank_correlation == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
    nearest = [(m @ m.T - 9 * np.eye(6)).argmax(1) for m in (a, b)]
    assert quality.neighbours is not None
    assert quality.neighbours.value == pytest.approx((nearest[0] == nearest[1]).mean())


@pytest.mark.parametrize("family", ["bert_base", "bert", "qwen3"])
def test_a_model_against_itself_loses_nothing(family: str, texts: Path, tmp_path: Path) -> None:
    model = save_model(make_model(family), tmp_path / "model")
    if family == "qwen3":  # as Qwen3-Embedding: a language model with modules.json
        with_modules(model, ["Transformer", "Pooling", "Normalize"], {"pooling_mode_lasttoken": True})
    (quality,) = fp8pack.evaluate_encoder(model, model, text=str(texts)).checkpoints
    assert (quality.cosine_min, quality.rank_correlation) == (pytest.approx(1, abs=1e-12), pytest.approx(1, abs=1e-12))


def with_modules(folder: Path, kinds: list[str], pooling: dict[str, Any]) -> None:
    """Make a sentence-transformers model of a checkpoint."""
    modules = []
    for i, kind in enumerate(kinds):
        path = "" if kind == "Transformer" else f"{i}_{kind}"
        modules.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_pooling_is_that_of_modules_json(tmp_path: Path) -> None:
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    cases = {
        "pooling_mode_cls_token": hidden[0],
        "pooling_mode_mean_tokens": hidden.mean(0),
        "pooling_mode_max_tokens": hidden.amax(0),
        "pooling_mode_mean_sqrt_len_tokens": hidden.sum(0) / 5**0.5,
        "pooling_mode_lasttoken": hidden[-1],
    }
    for flag, expected in cases.items():
        with_modules(tmp_path, ["Transformer", "Pooling"], {flag: True, "word_embedding_dimension": 4})
        pool, _ = read_pooling(tmp_path, torch.device("cpu"))
        torch.testing.assert_close(pool(hidden), expected)
    with_modules(tmp_path, ["Transformer", "Pooling", "Dense", "Normalize"], {"pooling_mode": "mean"})
    weight, bias = torch.randn(3, 4), torch.randn(3)
    save_file({"linear.weight": weight, "linear.bias": bias}, tmp_path / "2_Dense" / "model.safetensors")
    config = {"activation_function": "torch.nn.modules.activation.Tanh"}
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(config))
    pool, name = read_pooling(tmp_path, torch.device("cpu"))
    projected = torch.tanh(weight @ hidden.mean(0) + bias)
    torch.testing.assert_close(pool(hidden), projected / projected.norm())
    assert name == "mean, dense"


def damages(folder: Path) -> Iterator[str]:
    """Ways in which a pooling cannot be read."""
    with_modules(folder, ["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True})
    (folder / "modules.json").write_text("[" * 100_000)
    yield "no JSON"
    (folder / "modules.json").write_text('{"a": 1}')
    yield "malformed"
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "../outside"}]))
    yield "outside"
    with_modules(folder, ["Transformer", "Pooling", "Router"], {"pooling_mode_mean_tokens": True})
    yield "'Router', which is not known"
    with_modules(folder, ["Transformer", "Pooling"], {"pooling_mode": "best"})
    yield "pooling that is not known: best"


def test_a_pooling_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for words in damages(tmp_path):
        with pytest.raises(InputError, match=words):
            read_pooling(tmp_path, torch.device("cpu"))


def test_a_classifier_is_compared_by_its_labels(texts: Path, tmp_path: Path) -> None:
    config = FAMILIES["bert_base"][1]()
    config.num_labels = 5
    model = randomize(transformers.BertForSequenceClassification._from_config(config, dtype=torch.bfloat16))
    source = save_model(model, tmp_path / "model")
    fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC")
    fp8pack.unpack(tmp_path / "out", tmp_path / "back", dtype="float32")
    found = fp8pack.evaluate_encoder(tmp_path / "out", source, text=str(texts), activations="none")
    logits = []
    for folder in (source, tmp_path / "back"):
        whole = transformers.BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            rows = [whole(**make_tokenizer()(text, return_tensors="pt")).logits[0] for text in SENTENCES]
        logits.append(torch.stack(rows).double())
    p, q = (torch.log_softmax(rows, 1) for rows in logits)
    (quality,) = found.checkpoints
    assert found.kind == "classes"
    assert quality.kl is not None
    assert quality.agreement is not None
    assert quality.kl.value == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3, abs=1e-8)
    assert quality.agreement.value == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    with pytest.raises(RecipeError, match="cosine is not measured of classes"):
        fp8pack.evaluate_encoder(tmp_path / "out", source, text=str(texts), fail_if="cosine<0.9")


def test_the_command_knows_an_encoder_and_its_gates(bert: Path, texts: Path, tmp_path: Path) -> None:
    fp8pack.pack(bert, tmp_path / "out", scheme="FP8_DYNAMIC")
    words = ["eval", str(tmp_path / "out"), "--against", str(bert), "--text", str(texts), "-q"]
    page = tmp_path / "page.html"
    ran = CliRunner().invoke(app, [*words, "--html", str(page), "--fail-if", "cosine<0.5"])
    assert ran.exit_code == 0, ran.exception
    assert "same nearest neighbour" in ran.stdout
    assert "same nearest neighbour" in page.read_text(encoding="utf-8")
    assert "rank correlation" in CliRunner().invoke(app, [*words, "--markdown"]).stdout
    ran = CliRunner().invoke(app, [*words, "--json", "--fail-if", "cosine<=1"])
    assert isinstance(ran.exception, BoundError)
    assert json.loads(ran.stdout)["kind"] == "embeddings"


def test_what_is_no_encoder_is_refused(texts: Path, tmp_path: Path) -> None:
    model = save_model(make_model("qwen3"), tmp_path / "model")
    with pytest.raises(InputError, match="Qwen3ForCausalLM is no encoder that is known"):
        fp8pack.evaluate_encoder(model, model, text=str(texts))
    t5 = save_model(make_model("t5"), tmp_path / "t5")
    with pytest.raises(InputError, match="predicts no next token"):
        fp8pack.evaluate(t5, t5, text=str(texts))


def test_ranks_of_equal_numbers_are_shared() -> None:
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 2, 3])) == pytest.approx(1)
    a, b = np.array([1.0, 2, 2, 3, 5]), np.array([2.0, 1, 3, 3, 4])
    assert spearman(a, b) == pytest.approx(np.corrcoef([0, 1.5, 1.5, 3, 4], [1, 0, 2.5, 2.5, 4])[0, 1])
    assert spearman(np.ones(3), np.ones(3)) == 1.0


# compare_models


class Denoiser(nn.Module):
    """A block of a diffusion model: linears, a residual that is added in place, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        hidden = nn.functional.dropout(torch.relu(self.first(x)), training=True)
        out = self.second(hidden)
        kept = out
        out += x * scale  # in place: what a hook has seen must not change with it
        return {"sample": out, "kept": kept}


def test_two_models_are_compared_module_by_module() -> None:
    torch.manual_seed(0)
    a, b = Denoiser(), Denoiser()
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        b.second.weight.mul_(1.01)
    batches = [torch.randn(4, 8), (torch.randn(2, 8),), {"x": torch.randn(3, 8), "scale": 0.5}]
    found = fp8pack.compare_models(a, b, batches)
    assert [module.name for module in found.modules] == ["first", "second", ""]
    assert (found["first"].sqnr, found["first"].calls, found.num_batches) == (1000.0, 3, 3)
    seconds = found["second"]
    assert seconds.sqnr is not None
    assert seconds.sqnr == pytest.approx(40, abs=2)  # one percent, but for the bias
    assert seconds.cosine == pytest.approx(1, abs=1e-3)
    only = fp8pack.compare_models(a, b, [torch.randn(4, 8)], only="sec*", call=lambda model, batch: model(batch))
    assert [module.name for module in only.modules] == ["second"]
    with pytest.raises(RecipeError, match="matches no"):
        fp8pack.compare_models(a, b, batches, only="third")
    with pytest.raises(InputError, match="same shape"):
        fp8pack.compare_models(a, nn.Sequential(), [])


def test_a_nan_in_an_output_is_no_number() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad():
        b.weight[0, 0] = torch.nan
    (found,) = fp8pack.compare_models(a, b, [torch.ones(1, 4)]).modules
    assert (found.sqnr, found.cosine) == (None, None)
    assert json.dumps(fp8pack.compare_models(a, b, [torch.ones(1, 4)]).to_dict(), allow_nan=False)


def test_the_packed_model_is_compared_with_its_source(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "model")
    fp8pack.pack(tmp_path / "model", tmp_path / "out", scheme="FP8_DYNAMIC")
    ids = make_tokenizer()(SENTENCES[0], return_tensors="pt").input_ids
    source = transformers.AutoModel.from_pretrained(bert, dtype=torch.bfloat16)
    found = fp8pack.compare_models(source, fp8pack.load_model(tmp_path / "out"), [{"input_ids": ids}], only="*.query")
    assert len(found.modules) == 3
    assert all(20 < (module.sqnr or 0) < 45 for module in found.modules)
