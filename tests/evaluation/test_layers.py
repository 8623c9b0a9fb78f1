"""`evaluate_layers`: a part that is alone in FP8 costs what a checkpoint costs in which it alone is packed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration.tiny_models import LAYERS, make_model, save_model
from typer.testing import CliRunner

import fp8pack
from fp8pack.cli.app import app
from fp8pack.errors import DeadlineError, InputError, RecipeError

Case = tuple[Path, Path, dict[str, Any]]


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A source, its checkpoint, and the options of every evaluation."""
    folder = tmp_path_factory.mktemp("layers")
    model = save_model(make_model(request.param), folder / "model")
    fp8pack.pack(model, folder / "out", scheme="FP8_DYNAMIC")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {i}, not long"}) + "\n" for i in range(9)))
    return model, folder / "out", {"text": str(folder / "texts.jsonl"), "device": "cpu"}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def test_a_layer_costs_what_it_costs_when_it_alone_is_packed(case: Case, tmp_path: Path) -> None:
    source, packed, options = case
    found = fp8pack.evaluate_layers(packed, source, **options)
    assert [part.name for part in found.parts] == [f"model.layers.{i}" for i in range(LAYERS)]
    for i, part in enumerate(found.parts):
        fp8pack.pack(source, tmp_path / str(i), scheme="FP8_DYNAMIC", only=f"model.layers.{i}.*")
        (alone,) = fp8pack.evaluate(tmp_path / str(i), source, **options).checkpoints
        assert part.kl == alone.kl
        assert part.top1 == alone.top1


def test_a_linear_costs_what_it_costs_when_it_alone_is_packed(case: Case, tmp_path: Path) -> None:
    source, packed, options = case
    found = fp8pack.evaluate_layers(packed, source, by="linear", **options)
    name = f"model.layers.{LAYERS - 1}.self_attn.o_proj"
    fp8pack.pack(source, tmp_path / "one", scheme="FP8_DYNAMIC", only=f"{name}.weight")
    (alone,) = fp8pack.evaluate(tmp_path / "one", source, **options).checkpoints
    (part,) = [part for part in found.parts if part.name == name]
    assert part.kl == alone.kl


def test_the_outputs_of_linears_are_compared_on_the_inputs_of_the_source(case: Case) -> None:
    source, packed, options = case
    found = fp8pack.evaluate_layers(packed, source, **options)
    (name, sqnr), *_ = [
        (linear.name, linear.sqnr) for linear in found.linears if linear.name.endswith("1.self_attn.v_proj")
    ]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    module = model.get_submodule(name)
    weight = fp8pack.load_packed(packed)[f"{name}.weight"]
    signal = noise = 0.0

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal signal, noise
        x = inputs[0][0]
        scale = x.abs().amax(-1, keepdim=True) / 448
        rounded = (x / scale).to(torch.float8_e4m3fn).float() * scale
        error = output[0].double() - rounded.double() @ weight.dequantize(torch.float32).double().T
        signal, noise = signal + float(output.double().square().sum()), noise + float(error.square().sum())

    module.register_forward_hook(hook)
    tokenizer = AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        for i in range(9):
            model(**tokenizer(f"text {i}, not long", return_tensors="pt"))
    assert sqnr == pytest.approx(10 * torch.log10(torch.tensor(signal / noise)).item(), abs=0.02)


def test_half_the_layers_and_two_forwards_are_enough(case: Case) -> None:
    """Passes through layers, and through the head, over those of a bare forward."""
    source, packed, options = case
    totals = set()
    fp8pack.evaluate_layers(packed, source, on_progress=lambda done, total: totals.add((done, total)), **options)
    done, total = max(totals)
    tokens = total / (LAYERS * (LAYERS + 1) / 2 + LAYERS + 1 + LAYERS)
    assert done == total
    assert tokens == int(tokens)
    assert total / tokens / LAYERS <= LAYERS / 2 + 2 + (LAYERS + 1) / LAYERS  # a head is a layer here


def test_what_is_done_is_not_done_again(case: Case, tmp_path: Path) -> None:
    source, packed, options = case
    whole = fp8pack.evaluate_layers(packed, source, **options)

    class Stopped(Exception):
        pass

    for stop in (0.2, 0.5, 0.8, 0.97):

        def on_progress(done: int, total: int, stop: float = stop) -> None:
            if done > stop * total:
                raise Stopped

        with pytest.raises(Stopped):
            fp8pack.evaluate_layers(packed, source, state=tmp_path / "state", on_progress=on_progress, **options)
    with pytest.raises(DeadlineError):
        fp8pack.evaluate_layers(packed, source, state=tmp_path / "state", deadline=0.0, **options)
    calls: list[int] = []
    again = fp8pack.evaluate_layers(
        packed, source, state=tmp_path / "state", on_progress=lambda done, total: calls.append(done), **options
    )
    assert (again.parts, again.linears) == (whole.parts, whole.linears)
    assert calls[-1] == max(calls)
    assert not list((tmp_path / "state").iterdir())


def test_the_command_shows_layers(case: Case, tmp_path: Path) -> None:
    source, packed, options = case
    words = ["eval", str(packed), "--against", str(source), "--text", options["text"], "-q"]
    page = tmp_path / "page.html"
    ran = CliRunner().invoke(app, [*words, "--per-layer", "--html", str(page)])
    assert ran.exit_code == 0, ran.exception
    assert "model.layers.2" in ran.stdout
    assert "The layer that costs most is model.layers." in page.read_text(encoding="utf-8")
    ran = CliRunner().invoke(app, [*words, "--per-linear", "--markdown"])
    assert "| `model.layers.0.self_attn.q_proj` |" in ran.stdout
    ran = CliRunner().invoke(app, [*words, "--per-layer", "--fail-if", "kl>1"])
    assert isinstance(ran.exception, RecipeError)


def test_a_checkpoint_without_fp8_is_refused(case: Case) -> None:
    source, _, options = case
    with pytest.raises(InputError, match="no FP8 linear"):
        fp8pack.evaluate_layers(source, source, by="linear", **options)
