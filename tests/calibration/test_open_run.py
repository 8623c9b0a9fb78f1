"""What is decided, and said, before the first token is run."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import verbs
from calibration.tiny_models import make_model, save_model
from checkpoints import DEMO

import fp8pack
from fp8pack.calibration import open_run as preparing
from fp8pack.calibration.calibration_journal import CalibrationJournal
from fp8pack.calibration.observers import observable
from fp8pack.calibration.options import CalibrateOptions
from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.errors import DeadlineError, InputError, OutputError, RecipeError
from fp8pack.gemm import device as devices
from fp8pack.machine import usable_memory


def options(folder: Path, **asked: Any) -> CalibrateOptions:
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        prompts.write_text("".join(f'{{"text": "def f{i}(x): return x + {i}"}}\n' for i in range(100)))
    given = {"output": folder / "c.safetensors", "prompts": str(prompts), "num_prompts": 6}
    return CalibrateOptions(**given | asked)


def test_a_length_beyond_the_positions_of_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="256 positions"):
        verbs.calibrate(DEMO, options(tmp_path, max_length=257))


def test_a_token_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    model = save_model(make_model("qwen3"), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((DEMO / name).read_bytes())
    with pytest.raises(InputError, match=r"line 1 has token .* tokenizer is of another model"):
        verbs.calibrate(model, options(tmp_path))


@pytest.mark.parametrize("asked", [{"batch_size": 0}, {"num_prompts": 0}, {"max_length": 0}, {"stream_layers": "yes"}])
def test_options_that_mean_nothing_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        CalibrateOptions(**asked)


def test_a_run_that_did_not_converge_is_no_end_of_one_that_should(tmp_path: Path) -> None:
    short = options(tmp_path, until_converged=True, max_length=8)
    assert len(read_calibration(Path(verbs.calibrate(DEMO, short).output)).prompts) == 6
    with pytest.raises(OutputError, match="exists"):
        verbs.calibrate(DEMO, options(tmp_path, until_converged=True, max_length=8, num_prompts=20))


def test_auto_continues_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeadlineError):
        verbs.calibrate(DEMO, options(tmp_path, deadline=0.0))
    monkeypatch.setattr(preparing, "free_memory", lambda device: 0)
    assert verbs.calibrate(DEMO, options(tmp_path)).streamed is False
    assert verbs.calibrate(DEMO, options(tmp_path, output=tmp_path / "d.safetensors")).streamed is True


def test_auto_streams_where_the_limit_of_a_container_is_less_than_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine has room; the control group has not."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "meminfo").write_text(f"MemAvailable: {10**9} kB\n")
    monkeypatch.setattr(devices, "usable_memory", partial(usable_memory, tmp_path, tmp_path))
    assert verbs.calibrate(DEMO, options(tmp_path)).streamed is False
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("500000\n")
    assert verbs.calibrate(DEMO, options(tmp_path, output=tmp_path / "d.safetensors")).streamed is True


class Unseen(torch.nn.Module):
    """A matrix that no linear holds."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.ones(4, 4))


def test_what_no_observer_reaches_is_not_observable() -> None:
    model = make_model("qwen3_moe")
    seen = observable(model, fp8pack.observe(model)._names)
    assert "model.layers.0.mlp.experts.1.up_proj" in seen
    assert "model.layers.0.self_attn.q_proj" in seen
    assert not observable(Unseen(), fp8pack.observe(Unseen())._names)


def test_experts_that_cannot_be_seen_are_named_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(make_model("qwen3_moe"), tmp_path / "model")
    monkeypatch.setattr(preparing, "observable", lambda model, names: set())
    facts = verbs.calibrate(model, options(tmp_path))
    assert [note for note in facts.notes if "cannot be recorded" in note]


def test_an_observation_of_nothing_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model was not called"):
        fp8pack.observe(torch.nn.Linear(4, 4)).save(tmp_path / "c.safetensors")
    with pytest.raises(InputError, match="no parameter 'nosuch'"):
        fp8pack.observe(torch.nn.Linear(4, 4), names={"nosuch": "a"})


def test_a_prompt_has_one_digest_whatever_type_its_tokens_have() -> None:
    model = make_model("qwen3")
    ids = torch.tensor([[5, 6, 7]])
    found = []
    for kind in (torch.int64, torch.int32):
        with torch.no_grad(), fp8pack.observe(model) as observation:
            model(input_ids=ids.to(kind))
        found.append(observation.prompts)
    assert found[0] == found[1]


def test_the_amax_of_each_head_of_k_and_v_is_told() -> None:
    model = make_model("qwen3")
    with torch.no_grad(), fp8pack.observe(model) as observation:
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    site = observation.calibration().by_point["model.layers.0.self_attn.v"]
    heads = model.config.num_key_value_heads
    assert site.heads == heads > 1
    assert site.head_amax.shape == (heads,)
    assert site.head_amax.max() == site.amax


def test_looking_at_a_journal_changes_nothing(tmp_path: Path) -> None:
    """It is looked at before the lock is taken, while another run may be writing."""
    path = tmp_path / "journal.jsonl"
    journal = CalibrationJournal(path)
    journal.resume({"fingerprint": "f", "prompts": "p", "options": {}, "streamed": True}, throw_away=False)
    with path.open("ab") as lines:
        lines.write(b'{"done": 1}\n{"do')
    before = path.read_bytes()
    assert CalibrationJournal(path).head()["streamed"] is True
    assert path.read_bytes() == before
