"""One layer in memory at a time: the same file, byte for byte, or a sentence that says why not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import verbs
from calibration.tiny_models import LAYERS, TEXTS, make_model, save_model, write_prompts
from torch import Tensor, nn

from fp8pack.calibration.options import CalibrateOptions
from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.errors import DeadlineError, InputError, RecipeError
from fp8pack.modelrun.loader import ModelLoader
from fp8pack.modelrun.stream_layers import Rounds, Stack, find_stack, probe
from fp8pack.planning.calibration_summary import CalibrationSummary

FAMILIES = ("qwen3", "gpt_neox", "bert", "qwen3_moe", "mixtral", "gemma2", "gemma3", "gpt_oss")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So that sums of floating-point numbers are always taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(folder: Path, output: Path, stream_layers: str, batch_size: int = 1, **options: Any) -> CalibrationSummary:
    prompts = write_prompts(output.with_suffix(".jsonl"))
    chosen = CalibrateOptions(
        output=output, prompts=str(prompts), batch_size=batch_size, stream_layers=stream_layers, **options
    )
    on_progress = chosen_progress.pop() if chosen_progress else (lambda done, total: None)
    return verbs.calibrate(folder, chosen, on_progress=on_progress)


chosen_progress: list[Callable[[int, int], None]] = []


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_run_writes_the_bytes_of_a_resident_one(family: str, batch_size: int, tmp_path: Path) -> None:
    folder = save_model(make_model(family), tmp_path / "model")
    all_experts = family in ("qwen3_moe", "gpt_oss")
    facts = run(folder, tmp_path / "on.safetensors", "on", batch_size, all_experts=all_experts)
    assert facts.streamed is True, facts.notes
    assert run(folder, tmp_path / "off.safetensors", "off", batch_size, all_experts=all_experts).streamed is False
    assert (tmp_path / "on.safetensors").read_bytes() == (tmp_path / "off.safetensors").read_bytes()


class Watch:
    """Looks at a model and at its folder whenever a batch is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.loaded: list[tuple[int, ...]] = []
        self.hidden: list[int] = []
        self.models: list[nn.Module] = []
        build, load = ModelLoader.__init__, ModelLoader.load

        def watched_build(loader: ModelLoader, *args: Any, **kwargs: Any) -> None:
            build(loader, *args, **kwargs)
            self.models.append(loader.model)

        def watched_load(loader: ModelLoader, parameters: Any) -> None:
            load(loader, parameters)
            self.loaded.append(self.layers_in_memory())

        monkeypatch.setattr(ModelLoader, "__init__", watched_build)
        monkeypatch.setattr(ModelLoader, "load", watched_load)

    def layers_in_memory(self) -> tuple[int, ...]:
        (model,) = self.models
        layers = model.get_submodule("model.layers")
        assert isinstance(layers, nn.ModuleList)
        return tuple(i for i, layer in enumerate(layers) if not all(p.is_meta for p in layer.parameters()))

    def __call__(self, done: int, total: int) -> None:
        self.loaded.append(self.layers_in_memory())
        self.hidden.append(sum(path.stat().st_size > 0 for path in self.folder.rglob("hidden-*")))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_no_two_layers_are_in_memory_and_hidden_states_leave_no_file(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(make_model(family), tmp_path / "model")
    (tmp_path / "out").mkdir()
    watch = Watch(monkeypatch, tmp_path / "out")
    chosen_progress.append(watch)
    run(folder, tmp_path / "out" / "c.safetensors", "on")
    assert set(watch.loaded) == {(), *((i,) for i in range(LAYERS))}
    assert watch.loaded.count((0,)) == 1 + len(TEXTS)
    assert max(watch.hidden) <= 2
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["c.jsonl", "c.safetensors"]


def test_progress_counts_every_token_once_for_each_layer_and_once_more(tmp_path: Path) -> None:
    folder = save_model(make_model("qwen3"), tmp_path / "model")
    seen: list[tuple[int, int]] = []
    chosen_progress.append(lambda done, total: seen.append((done, total)))
    run(folder, tmp_path / "c.safetensors", "on")
    tokens = read_calibration(tmp_path / "c.safetensors").by_point["model.norm.output"].tokens
    assert {total for _, total in seen} == {tokens * (LAYERS + 1)}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]


def test_a_run_that_was_stopped_goes_on_and_writes_the_same_bytes(tmp_path: Path) -> None:
    folder = save_model(make_model("gemma3"), tmp_path / "model")
    run(folder, tmp_path / "whole.safetensors", "on", 3)
    for attempt in range(3):  # each finishes a layer or fails the same way

        def stop(done: int, total: int, attempt: int = attempt) -> None:
            if done * (LAYERS + 1) > total * (attempt + 1.4):
                raise KeyboardInterrupt

        chosen_progress.append(stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "cut.safetensors", "on", 3)
        assert not (tmp_path / "cut.safetensors").exists()
    run(folder, tmp_path / "cut.safetensors", "on", 3)
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    with pytest.raises(DeadlineError, match="the deadline is reached"):
        run(folder, tmp_path / "late.safetensors", "on", 3, deadline=0.0)


def test_what_cannot_be_driven_runs_resident_and_says_why(tmp_path: Path) -> None:
    """ALBERT has one layer, which it calls several times."""
    folder = save_model(make_model("albert"), tmp_path / "model")
    facts = run(folder, tmp_path / "on.safetensors", "on")
    assert facts.streamed is False
    assert [note for note in facts.notes if "the whole model is loaded, not one layer at a time: " in note]
    run(folder, tmp_path / "off.safetensors", "off")
    assert (tmp_path / "on.safetensors").read_bytes() == (tmp_path / "off.safetensors").read_bytes()
    site = read_calibration(tmp_path / "on.safetensors")
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.input"
    assert site.by_point[name].tokens == LAYERS * site.by_point["predictions.dense.input"].tokens


def test_an_encoder_decoder_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = save_model(make_model("t5"), tmp_path / "model")
    with pytest.raises(InputError, match="is an encoder-decoder") as caught:
        run(folder, tmp_path / "c.safetensors", "on")
    assert "fp8pack.observe(model)" in caught.value.hint
    with pytest.raises(RecipeError, match="stream layers"):
        run(save_model(make_model("qwen3"), tmp_path / "other"), tmp_path / "c.safetensors", "sideways")


class Block(nn.Module):
    """A layer that may look at what its neighbours left."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)

    def forward(self, hidden: Tensor, state: Any = None, *, shared: Any = None, extra: Any = None) -> Tensor:
        for notes in (state, shared):
            if notes:
                hidden = hidden + notes[-1]
            if isinstance(notes, list):
                notes.append(hidden)
        hidden = hidden if extra is None else hidden + extra
        return hidden + torch.tanh(self.linear(hidden))


class Tower(nn.Module):
    """Embeds, goes through its layers in the way that `how` says, and ends with a head."""

    def __init__(self, how: str, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.embed = nn.Embedding(4, 8)
        self.layers = nn.ModuleList([Block() for _ in range(layers)])
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        state: list[Tensor] = []
        kept: list[Tensor] = []
        layers = list(self.layers)[::-1] if self.how == "backwards" else list(self.layers)
        for i, layer in enumerate(layers):
            match self.how:
                case "shared by name":
                    hidden = layer(hidden, shared=state)
                case "shared by position":
                    hidden = layer(hidden, state)
                case "scaled between":
                    hidden = layer(hidden) * 1.5
                case "other name":
                    hidden = layer(hidden=hidden)
                case "skips one":
                    hidden = layer(hidden) if i != 2 else hidden
                case "tuple":
                    hidden = (layer(hidden), None)[0]
                case "remembers":
                    hidden = layer(hidden, extra=kept[0] if kept else None)
                    kept.append(hidden)
                case "joined at the end":
                    hidden = layer(hidden)
                    kept.append(hidden)
                case _:
                    hidden = layer(hidden)
        if self.how == "joined at the end":
            hidden = torch.stack(kept).sum(0)
        logits: Tensor = self.head(hidden)
        return logits


def streamed_logits(model: Tower, stack: Stack, calls: list[Tensor], folder: Path) -> list[Tensor]:
    rounds, logits = Rounds(stack, folder), []
    for index in range(len(stack.layers) + 1):
        with rounds.round(index) as take:
            for ids in calls:
                take(lambda ids=ids: logits.append(model(ids)))
    return logits


@pytest.mark.parametrize(
    "how",
    [
        *("plain", "shared by name", "shared by position", "scaled between", "other name", "backwards", "skips one"),
        *("tuple", "remembers", "joined at the end"),
    ],
)
@torch.no_grad()
def test_a_model_is_driven_to_its_own_results_or_not_at_all(how: str, tmp_path: Path) -> None:
    """Whatever happens between the layers, what comes out is right, or a sentence says why it is not tried."""
    model = Tower(how)
    found = find_stack(model)
    assert not isinstance(found, str)
    calls = [torch.tensor([[0, 1, 2]]), torch.tensor([[3, 2], [1, 0]])]
    expected = [model(ids) for ids in calls]
    stack = probe(*found, lambda: model(torch.ones((1, 4), dtype=torch.long)))
    assert all("forward" not in vars(layer) for layer in model.layers)
    if isinstance(stack, str):
        assert how != "plain"
        assert stack
    else:
        for result, wanted in zip(streamed_logits(model, stack, calls, tmp_path), expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=0, atol=0)


def test_a_shared_state_is_named() -> None:
    model = Tower("shared by name")
    found = find_stack(model)
    assert not isinstance(found, str)
    assert probe(*found, lambda: model(torch.ones((1, 4), dtype=torch.long))) == "its layers share the argument shared"


def test_a_model_without_one_large_stack_has_none() -> None:
    assert isinstance(find_stack(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), str)
    halves = nn.ModuleDict({"a": nn.ModuleList([Block(), Block()]), "b": nn.ModuleList([Block(), Block()])})
    assert find_stack(halves, least_share=0.5) == "no list of layers has most of its weights"
    assert find_stack(halves)[0] == "a"
    assert isinstance(find_stack(nn.ModuleList([nn.ModuleList([Block()])])), str)
    assert isinstance(find_stack(nn.ReLU()), str)


@torch.no_grad()
def test_layers_are_whole_again_after_an_error(tmp_path: Path) -> None:
    model = Tower("plain")
    rounds = Rounds(Stack("layers", tuple(model.layers), False), tmp_path)
    ids = torch.tensor([[1, 2]])
    before = model(ids)

    def broken() -> None:
        raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"), rounds.round(0) as take:
        take(broken)
    assert torch.equal(model(ids), before)
