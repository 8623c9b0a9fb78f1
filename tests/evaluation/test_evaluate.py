"""`evaluate`: its numbers are those of a script of twenty lines, and a model against itself loses nothing."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration.tiny_models import make_model, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3 import modeling_qwen3

import fp8pack
from fp8pack.errors import BoundError, InputError, RecipeError, VerificationError
from fp8pack.evaluation.divergence import compare_logits
from fp8pack.evaluation.intervals import Bootstrap
from fp8pack.modelrun.prompts import BUILT_IN, HELD_OUT, load_prompts
from fp8pack.numerics.replaced_forwards import replaced_forwards
from fp8pack.runtime.linear import FP8Linear

DEMO = Path(__file__).parents[2] / "examples" / "demo-qwen3"
TEXTS = ["one text, not long", "another text\nof two lines", "and a third one, which is somewhat longer than both"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of a few documents."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small mixture of experts."""
    return save_model(make_model("qwen3_moe"), tmp_path_factory.mktemp("moe") / "model")


def by_hand(source: Path, packed: Path, texts: list[str]) -> dict[str, float]:
    """Perplexity ratio, KL and agreement of W8A8 with a scale for each token, by transformers and float64 alone."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = {name: tensor for file in packed.glob("*.safetensors") for name, tensor in load_file(file).items()}
    linears = {name.removesuffix(".weight_scale"): scale for name, scale in tensors.items() if "weight_scale" in name}
    rows: list[np.ndarray] = []

    def forward(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        weight, scale = tensors[f"{name}.weight"].float(), linears[name].reshape(1, -1)

        def w8a8(x: torch.Tensor) -> torch.Tensor:
            input_scale = x.abs().amax(-1, keepdim=True) / 448
            payload = (x / input_scale).to(torch.float8_e4m3fn).float()
            return torch.nn.functional.linear(payload, weight) * scale * input_scale

        return w8a8

    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            p = torch.log_softmax(model(ids).logits[0, :-1].double(), 1).numpy()
            with replaced_forwards([(model.get_submodule(name), forward(name)) for name in linears]):
                q = torch.log_softmax(model(ids).logits[0, :-1].double(), 1).numpy()
            follows = ids[0, 1:].numpy()
            at = np.arange(len(follows))
            kl = (np.exp(p) * (p - q)).sum(1)
            rows += list(np.stack([-p[at, follows], -q[at, follows], kl, p.argmax(1) == q.argmax(1)], 1))
    base, loss, kl, same = np.mean(rows, 0)
    return {"perplexity": math.exp(loss), "ppl_ratio": math.exp(loss - base), "kl": kl, "top1": same}


def test_logits_are_compared_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(70, 1000, generator=generator) * 3
    other = base + torch.randn(70, 1000, generator=generator) * 0.1
    follows = torch.randint(0, 1000, (70,), generator=generator)
    found = compare_logits(base, other, follows)
    at = np.arange(70)
    p, q = (logits.double().numpy() for logits in (base, other))
    p, q = (logits - np.log(np.exp(logits).sum(1, keepdims=True)) for logits in (p, q))
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(1), rtol=1e-9)
    np.testing.assert_allclose(found.base_loss, -p[at, follows], rtol=1e-9)
    np.testing.assert_allclose(found.loss, -q[at, follows], rtol=1e-9)
    np.testing.assert_allclose(found.probability, np.exp(q[at, follows]) - np.exp(p[at, follows]), rtol=1e-9)
    assert (found.top1 == (p.argmax(1) == q.argmax(1))).all()
    fives = [len({*np.argsort(-a)[:5]} & {*np.argsort(-b)[:5]}) / 5 for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(found.top5, fives)


@pytest.mark.parametrize("model", ["demo", "moe"])
def test_the_numbers_are_those_of_a_script(model: str, moe: Path, texts: Path, tmp_path: Path) -> None:
    source = DEMO if model == "demo" else moe
    ignored = ["*experts*"] if model == "moe" else []  # which the script does not simulate
    fp8pack.pack(source, tmp_path / "packed", scheme="FP8_DYNAMIC", ignore=ignored)
    found = fp8pack.evaluate(tmp_path / "packed", source, text=str(texts))
    expected = by_hand(source, tmp_path / "packed", TEXTS)
    (quality,) = found.checkpoints
    assert quality.activations == "dynamic"
    assert found.num_documents == len(TEXTS)
    assert quality.perplexity.value == pytest.approx(expected["perplexity"], rel=1e-5)
    assert quality.ppl_ratio.value == pytest.approx(expected["ppl_ratio"], rel=1e-5)
    assert quality.kl.value == pytest.approx(expected["kl"], rel=1e-3, abs=1e-8)
    assert quality.top1.value == pytest.approx(expected["top1"], abs=0.02)
    assert quality.kl.low <= quality.kl.value <= quality.kl.high
    assert quality.kl_max >= quality.kl_p999.value >= quality.kl_p99.value >= quality.kl_median.value > 0


def test_a_model_against_itself_loses_nothing(moe: Path, texts: Path) -> None:
    (quality,) = fp8pack.evaluate(moe, moe, text=str(texts)).checkpoints
    assert (quality.kl.value, quality.kl_max, quality.ppl_ratio.value) == (0.0, 0.0, 1.0)
    assert (quality.top1.value, quality.top5.value, quality.probability_rms.value) == (1.0, 1.0, 0.0)


def test_weights_alone_cost_less_than_with_activations(moe: Path, texts: Path, tmp_path: Path) -> None:
    fp8pack.pack(moe, tmp_path / "packed", scheme="FP8_DYNAMIC")
    fp8pack.unpack(tmp_path / "packed", tmp_path / "unpacked", dtype="float32")
    given = {"text": str(texts)}
    (dynamic,) = fp8pack.evaluate(tmp_path / "packed", moe, **given).checkpoints
    (weights,) = fp8pack.evaluate(tmp_path / "packed", moe, activations="none", **given).checkpoints
    (floats,) = fp8pack.evaluate(tmp_path / "unpacked", moe, **given).checkpoints
    assert weights.activations == floats.activations == "none"
    assert 0 < weights.kl.value < dynamic.kl.value
    assert floats.kl.value == pytest.approx(weights.kl.value, rel=1e-3)
    with pytest.raises(InputError, match="no static scale of its input"):
        fp8pack.evaluate(tmp_path / "packed", moe, activations="static", **given)


def test_static_scales_are_simulated(texts: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.safetensors"
    fp8pack.calibrate(DEMO, calibration, prompts=str(texts))
    fp8pack.pack(DEMO, tmp_path / "static", scheme="FP8", calibration=calibration, kv_cache=True)
    found = fp8pack.evaluate(tmp_path / "static", DEMO, text=str(texts))
    (dynamic,) = fp8pack.evaluate(tmp_path / "static", DEMO, text=str(texts), activations="dynamic").checkpoints
    assert found.checkpoints[0].activations == "static"
    assert found.checkpoints[0].kl.value != dynamic.kl.value
    assert f"the FP8 KV cache of {tmp_path / 'static'} is simulated with its scales" in found.notes


def test_the_kv_cache_is_that_of_a_script(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, packed = tmp_path / "calibration.safetensors", tmp_path / "packed"
    fp8pack.calibrate(DEMO, calibration, prompts=str(texts))
    fp8pack.pack(DEMO, packed, scheme="FP8_DYNAMIC", calibration=calibration, kv_cache=True)
    tensors = {name: tensor for file in packed.glob("*.safetensors") for name, tensor in load_file(file).items()}
    scales = {name: float(tensor) for name, tensor in tensors.items() if name.endswith(("k_scale", "v_scale"))}
    (found,) = fp8pack.evaluate(packed, DEMO, text=str(texts)).checkpoints

    def rounded(states: torch.Tensor, scale: float) -> torch.Tensor:
        return (states / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    def without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name not in scales}

    plain = tmp_path / "plain"
    plain.mkdir()
    for file in packed.iterdir():
        if file.suffix == ".safetensors":
            save_file(without(load_file(file)), plain / file.name, {"format": "pt"})
        elif file.name == "config.json":
            config = json.loads(file.read_text())
            config["quantization_config"]["kv_cache_scheme"] = None
            (plain / file.name).write_text(json.dumps(config))
        elif file.name not in ("fp8pack.json", "model.safetensors.index.json"):
            (plain / file.name).write_bytes(file.read_bytes())
    rotate, layers = modeling_qwen3.apply_rotary_pos_emb, iter(range(1_000_000))
    num_layers = json.loads((DEMO / "config.json").read_text())["num_hidden_layers"]

    def rotary(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = rotate(q, k, *args, **kwargs)
        layer = next(layers) % (2 * num_layers)  # the source's layers, then the checkpoint's
        scale = scales[f"model.layers.{layer % num_layers}.self_attn.k_scale"]
        return (q, k) if layer < num_layers else (q, rounded(k, scale))

    class Rounding(FP8Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            if not self.name.endswith("v_proj.weight"):
                return out
            return rounded(out, scales[self.name.replace("v_proj.weight", "v_scale")])

    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", rotary)
    monkeypatch.setattr("fp8pack.runtime.model.FP8Linear", Rounding)
    (by_hand,) = fp8pack.evaluate(plain, DEMO, text=str(texts)).checkpoints
    assert found.kl.value == pytest.approx(by_hand.kl.value, rel=1e-6)
    (weights,) = fp8pack.evaluate(packed, DEMO, text=str(texts), activations="none").checkpoints
    assert weights.kl.value < found.kl.value


def test_several_checkpoints_are_compared_as_one_is(moe: Path, texts: Path, tmp_path: Path) -> None:
    paths = [tmp_path / scheme for scheme in ("FP8_DYNAMIC", "FP8_SCALED")]
    for path in paths:
        fp8pack.pack(moe, path, scheme=path.name)
    together = fp8pack.evaluate(paths, moe, text=str(texts))
    alone = [fp8pack.evaluate(path, moe, text=str(texts)).checkpoints[0] for path in paths]
    assert list(together.checkpoints) == alone
    assert fp8pack.Evaluation.__name__ in repr(together)


def test_long_documents_are_cut_into_windows(moe: Path, texts: Path) -> None:
    found = fp8pack.evaluate(moe, moe, text=str(texts), max_length=8)
    whole = fp8pack.evaluate(moe, moe, text=str(texts))
    lengths = [len(text.encode()) for text in TEXTS]
    assert whole.num_tokens == sum(length - 1 for length in lengths)
    assert found.num_tokens == sum(length - math.ceil(length / 8) for length in lengths)
    few = fp8pack.evaluate(moe, moe, text=str(texts), num_tokens=30)
    assert few.num_documents == 2
    assert few.num_tokens == 28
    few_documents = "2 documents: intervals need about 8"
    assert few.notes == ("the first 30 tokens are evaluated: --num-tokens takes more", few_documents)


def test_percentiles_and_intervals_are_over_documents() -> None:
    values = np.random.default_rng(0).normal(size=200)
    bootstrap = Bootstrap([50, 30, 100, 20])
    for percent in (50.0, 90.0, 99.0, 99.9):
        expected = np.percentile(values, percent, method="inverted_cdf")
        assert bootstrap.percentile(values, percent).value == expected
    found = bootstrap.mean(np.repeat([1.0, 2.0, 3.0, 4.0], [50, 30, 100, 20]))
    assert found.value == pytest.approx((50 + 60 + 300 + 80) / 200)
    assert 1.0 <= found.low < found.value < found.high <= 4.0
    constant = bootstrap.mean(np.full(200, 0.25))
    assert (constant.value, constant.low, constant.high) == (0.25, 0.25, 0.25)


def test_bounds_are_broken_by_the_worse_end(moe: Path, texts: Path, tmp_path: Path) -> None:
    fp8pack.pack(moe, tmp_path / "packed", scheme="FP8_DYNAMIC")
    (quality,) = fp8pack.evaluate(tmp_path / "packed", moe, text=str(texts)).checkpoints
    between = (quality.kl.value + quality.kl.high) / 2
    given: dict[str, Any] = {"text": str(texts), "fail_if": f"kl>{between:.9f}"}
    fp8pack.evaluate(tmp_path / "packed", moe, fail_on="point", **given)
    with pytest.raises(BoundError, match=r"kl of .*packed is .*the worst document is"):
        fp8pack.evaluate(tmp_path / "packed", moe, **given)
    fp8pack.evaluate(tmp_path / "packed", moe, text=str(texts), fail_if=["top1<0.1", "ppl_ratio>2"])
    with pytest.raises(RecipeError, match="is not a bound"):
        fp8pack.evaluate(tmp_path / "packed", moe, text=str(texts), fail_if="sqnr_min<3")


def test_a_nan_fails_and_is_named(moe: Path, texts: Path, tmp_path: Path) -> None:
    fp8pack.pack(moe, tmp_path / "packed", scheme="FP8_DYNAMIC")
    shard = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    (tmp_path / "packed" / "fp8pack.json").unlink()
    with pytest.raises(VerificationError, match=r"packed: a logit is not a finite number"):
        fp8pack.evaluate(tmp_path / "packed", moe, text=str(texts))


def test_the_held_out_text_is_none_of_the_prompts() -> None:
    held_out = [prompt.content for prompt in load_prompts([HELD_OUT], 1000)]
    prompts = " ".join(str(prompt.content) for prompt in load_prompts([BUILT_IN], 1000))
    assert len(held_out) == 24
    for text in held_out:
        assert isinstance(text, str)
        assert not any(text[i : i + 60] in prompts for i in range(0, len(text) - 60, 20))


def test_the_command_prints_a_table_or_a_document(moe: Path, texts: Path, tmp_path: Path) -> None:
    fp8pack.pack(moe, tmp_path / "packed", scheme="FP8_DYNAMIC")
    command = [sys.executable, "-m", "fp8pack", "eval", str(tmp_path / "packed"), "--against", str(moe)]
    command += ["--text", str(texts), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "same top token" in done.stdout
    assert done.stderr == ""
    done = subprocess.run([*command, "--json", "--fail-if", "kl>0"], capture_output=True, text=True, check=False)
    assert done.returncode == 8
    document = json.loads(done.stdout)
    assert document["checkpoints"][0]["kl"]["value"] > 0
    assert len(document["checkpoints"][0]["worst_positions"]) == 10
    assert "the worst document is texts.jsonl" in done.stderr
