"""`recommend`: every scheme that the targets load is measured as `evaluate` measures it, and the best is named."""

import json
import shlex
from pathlib import Path

import pytest
from calibration.tiny_models import TEXTS, make_model, save_model, write_prompts
from typer.testing import CliRunner

import fp8pack
from fp8pack.cli.app import app
from fp8pack.errors import RecipeError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("qwen3"), tmp_path_factory.mktemp("recommend") / "model")


@pytest.fixture(scope="module")
def text(model: Path) -> str:
    path = model.parent / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}, not long"}) + "\n" for i in range(9)))
    return str(path)


def test_each_scheme_is_measured_as_evaluate_does_and_the_best_is_taken(model: Path, text: str, tmp_path: Path) -> None:
    before = sorted(path.name for path in model.parent.iterdir())
    found = fp8pack.recommend(model, text=text, device="cpu")
    assert sorted(path.name for path in model.parent.iterdir()) == before
    measured = [option for option in found.options if option.kl is not None]
    assert {option.scheme for option in measured} == {"FP8_DYNAMIC", "MXFP8", "W8A16", "FP8_SCALED"}
    problems = {option.scheme: option.problem for option in found.options if option.problem}
    assert problems["FP8"] == "it needs a calibration"
    assert [option.kl.value for option in measured if option.kl] == sorted(o.kl.value for o in measured if o.kl)
    fp8pack.pack(model, tmp_path / "out", scheme=found.take)
    (alone,) = fp8pack.evaluate(tmp_path / "out", model, text=text, device="cpu").checkpoints
    best = next(option for option in measured if option.scheme == found.take)
    assert best.kl is not None
    assert best.kl.value == pytest.approx(alone.kl.value, rel=1e-3)
    assert best.activations != "none"
    assert all(option.kl.value >= best.kl.value for option in measured if option.kl and option.activations != "none")


def test_with_second_moments_compensated_rounding_is_measured_and_the_command_packs_it(
    model: Path, text: str, tmp_path: Path
) -> None:
    calibration = tmp_path / "c.safetensors"
    prompts = write_prompts(tmp_path / "prompts.jsonl", TEXTS)
    fp8pack.calibrate(model, calibration, prompts=str(prompts), second_moments="full", device="cpu")
    found = fp8pack.recommend(model, targets="vllm", calibration=calibration, text=text, device="cpu")
    assert {(option.scheme, option.rounding) for option in found.options if option.kl} >= {
        ("FP8_DYNAMIC", "nearest"),
        ("FP8_DYNAMIC", "compensated"),
        ("FP8", "nearest"),
    }
    words = shlex.split(found.command)[1:]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out"), "-q"])
    assert done.exit_code == 0, done.output


def test_where_no_target_loads_anything_it_says_so(model: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="no scheme"):
        fp8pack.recommend(model, targets="tensorrt-llm,comfyui", text=text)


def test_the_command_prints_a_table_and_what_to_take(model: Path, text: str) -> None:
    done = CliRunner().invoke(
        app, ["recommend", str(model), "--text", text, "--target", "vllm", "--device", "cpu", "-q"]
    )
    assert done.exit_code == 0, done.output
    assert "take     FP8_DYNAMIC" in done.stdout or "take     MXFP8" in done.stdout
    assert "next     fp8pack pack" in done.stdout
    as_json = CliRunner().invoke(app, ["recommend", str(model), "--text", text, "--device", "cpu", "-q", "--json"])
    assert json.loads(as_json.stdout)["take"]
