"""Every kind of hint is applied as a person would apply it, and then the command succeeds.

tests/engines/test_remedies.py does the same with the remedies of verdicts.
"""

import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from checkpoints import DEMO, llama_config, llama_tensors, random_weight, write_model, write_shard

import fp8pack
from fp8pack.cli.app import app, main
from fp8pack.errors import Fp8PackError

pytestmark = pytest.mark.slow

SWITCHES = {"--strict-target", "--overwrite", "--no-resume", "--kv-cache", "--until-converged", "--all-experts"}
UP = "model.layers.0.mlp.up_proj.weight"


@dataclass
class Place:
    """A directory with checkpoints, and the words that hints leave to the reader."""

    folder: Path
    words: dict[str, str]

    def model(self, tensors: Any = None, config: Any = None) -> Path:
        return write_model(self.folder / "model", tensors or llama_tensors(), config or llama_config())


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "prompts.jsonl").write_text("".join(f'{{"text": "{i} is a number"}}\n' for i in range(4)))
    return fp8pack.calibrate(DEMO, folder / "c.safetensors", prompts=str(folder / "prompts.jsonl")).output


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, {})


def failure_of(command: list[str]) -> Fp8PackError:
    with pytest.raises(Fp8PackError) as caught:
        app(command, standalone_mode=False)
    assert caught.value.command_hint, str(caught.value)
    return caught.value


def run(command: list[str]) -> None:
    """Run a command in this process; it must succeed."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    argv = sys.argv
    try:
        sys.argv = ["fp8pack", *command]
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, command
    finally:
        sys.argv = argv
        for signum, handler in before.items():
            signal.signal(signum, handler)


def without(command: list[str], option: str, value: str | None = None) -> list[str]:
    """A command without an option and its value; all of them, or the one of this value."""
    kept, words = [], iter(command)
    for word in words:
        if word == option:
            found = None if option in SWITCHES else next(words)
            if value in (None, found):
                continue
            kept += [word, str(found)]
        else:
            kept.append(word)
    return kept


def options_in(text: str) -> Iterator[tuple[str, str | None]]:
    words = shlex.split(text)
    for i, word in enumerate(words):
        if re.fullmatch(r"--[a-z-]+|-o", word):
            yield word, None if word in SWITCHES else words[i + 1]


def applied(command: list[str], way: str, place: Place) -> list[str]:
    """The command as changed by one way out; a command in backticks is run first."""
    for name, value in place.words.items():
        way = way.replace(name, value)
    if match := re.match(r"run `fp8pack ([^`]*)`, then(?: the same command with| use)? `?([^`]*)`?$", way):
        run(shlex.split(match[1]))
        way = match[2]
    if match := re.match(r"leave out (--[a-z-]+)(?: (\S+))?$", way):
        return without(command, match[1], match[2])
    if way == "choose another -o":
        return [*without(command, "-o"), "-o", str(place.folder / "another")]
    if match := re.match(r"choose ([\w-]+)", way):  # one of the values that there are
        option = next(word for word in command if word.startswith("--"))
        return [*without(command, option), option, match[1]]
    changes = list(options_in(way))
    assert changes, way
    for option, value in changes:
        command = without(command, option, (value or "").removeprefix("?") if option == "--ignore" else None)
        command = [*command, option, *([] if value is None else [value])]
    return command


def ways_of(hint: str) -> list[str]:
    return re.split(r",? or (?=--|leave out|choose)|, or (?=--)", hint)


Case = Callable[[Place, Path], list[str]]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    CASES[make.__name__] = make
    return make


@case
def a_pattern_without_its_star(place: Place, _: Path) -> list[str]:
    return ["pack", str(place.model()), "--only", "down_proj"]


@case
def a_regular_expression_that_is_searched(place: Place, _: Path) -> list[str]:
    return ["pack", str(place.model()), "--only", r"re:layers\.0"]


@case
def a_pattern_of_nothing(place: Place, _: Path) -> list[str]:
    return ["pack", str(place.model()), "--ignore", "absent"]


@case
def a_norm_to_be_packed(place: Place, _: Path) -> list[str]:
    return ["pack", str(place.model()), "--pack", "model.norm.weight"]


@case
def norms_to_be_packed(place: Place, _: Path) -> list[str]:
    return ["pack", str(place.model()), "--pack", "*norm"]


@case
def a_scheme_that_is_not_known(place: Place, _: Path) -> list[str]:
    return ["pack", str(place.model()), "--scheme", "FP9"]


@case
def a_percentile_and_a_warmup(place: Place, calibration: Path) -> list[str]:
    command = ["pack", str(DEMO), "-o", "out", "--calibration", str(calibration), "--scheme", "FP8"]
    return [*command, "--percentile", "99.9", "--warmup", "1"]


@case
def a_margin_of_nothing(place: Place, calibration: Path) -> list[str]:
    place.words["FILE"] = str(calibration)
    return ["pack", str(DEMO), "-o", "out", "--margin", "1"]


@case
def a_calibration_of_nothing(place: Place, calibration: Path) -> list[str]:
    return ["pack", str(DEMO), "-o", "out", "--scheme", "FP8_BLOCK", "--calibration", str(calibration)]


@case
def static_scales_without_a_calibration(place: Place, _: Path) -> list[str]:
    shutil.copytree(DEMO, place.folder / "demo")
    return ["pack", str(place.folder / "demo"), "-o", "out", "--scheme", "FP8"]


@case
def a_warmup_of_all_prompts(place: Place, calibration: Path) -> list[str]:
    place.words["choose a smaller --warmup"] = "--warmup 1"
    return ["pack", str(DEMO), "-o", "out", "--calibration", str(calibration), "--scheme", "FP8", "--warmup", "9"]


@case
def an_output_that_exists(place: Place, _: Path) -> list[str]:
    fp8pack.pack(place.model(), "out")
    return ["pack", str(place.folder / "model"), "-o", "out", "--scheme", "FP8_DYNAMIC"]


@case
def a_directory_for_a_single_file(place: Place, _: Path) -> list[str]:
    write_shard(place.folder / "x.safetensors", llama_tensors())
    return ["pack", "x.safetensors", "-o", "directory"]


@case
def a_target_that_does_not_load_it(place: Place, _: Path) -> list[str]:
    return ["pack", str(place.model()), "--target", "lmdeploy", "--scheme", "FP8_DYNAMIC"]


@case
def a_target_that_may_not_load_it(place: Place, _: Path) -> list[str]:
    source = place.model(config=llama_config("XForCausalLM"))
    return ["pack", str(source), "--target", "vllm", "--strict-target"]


@case
def names_that_a_compiled_model_left(place: Place, _: Path) -> list[str]:
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in llama_tensors().items()}
    return ["pack", str(place.model(tensors)), "--target", "vllm"]


@case
def a_prefix_that_no_name_has(place: Place, _: Path) -> list[str]:
    return ["pack", str(place.model()), "--strip-prefix", "module."]


@case
def a_weight_with_a_nan(place: Place, _: Path) -> list[str]:
    tensors = llama_tensors()
    for name in (UP, UP.replace("up_proj", "down_proj")):
        tensors[name][3, 5] = np.nan
    return ["pack", str(place.model(tensors))]


@case
def a_quant_method_without_these_scales(place: Place, _: Path) -> list[str]:
    return ["pack", str(place.model()), "--granularity", "group:64", "--quant-method", "fp8"]


@case
def scales_of_mx_that_are_no_powers_of_two(place: Place, _: Path) -> list[str]:
    return ["pack", str(place.model()), "--scheme", "MXFP8", "--scale-rounding", "none"]


@case
def shapes_that_no_block_fits(place: Place, _: Path) -> list[str]:
    tensors = {f"model.layers.0.self_attn.{leaf}_proj.weight": random_weight((96, 96)) for leaf in "qkvo"}
    return ["pack", str(place.model(tensors)), "--scheme", "FP8_BLOCK"]


@case
def a_size_that_is_no_size(place: Place, _: Path) -> list[str]:
    place.words["write 5GB, 256MiB or a number of bytes"] = "--max-memory 256MiB"
    return ["pack", str(place.model()), "--max-memory", "much"]


@case
def a_comparison_without_fp8(place: Place, _: Path) -> list[str]:
    return ["inspect", str(place.model()), "--against", str(place.folder / "model")]


@case
def targets_without_fp8(place: Place, _: Path) -> list[str]:
    return ["inspect", str(place.model()), "--target", "vllm"]


@case
def a_bound_that_is_not_measured(place: Place, _: Path) -> list[str]:
    fp8pack.pack(place.model(), "out")
    place.words["SOURCE"] = str(place.folder / "model")
    return ["inspect", "out", "--fail-if", "sqnr_min<20"]


def leave_unfinished(source: Path, **asked: Any) -> None:
    """Stop a pack after its last shard."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("fp8pack.packing.write.write_metadata", interrupt)
        fp8pack.pack(source, "out", **asked)


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@case
def unfinished_work_of_another_recipe(place: Place, _: Path) -> list[str]:
    source = place.model()
    leave_unfinished(source, scheme="FP8_BLOCK")
    return ["pack", str(source), "-o", "out", "--scheme", "FP8_DYNAMIC"]


@case
def unfinished_work_with_a_damaged_journal(place: Place, _: Path) -> list[str]:
    source = place.model()
    leave_unfinished(source)
    journal = place.folder / ".out.fp8pack-partial" / "journal.jsonl"
    journal.write_bytes(b"damaged\n" + journal.read_bytes())
    return ["pack", str(source), "-o", "out"]


@case
def prompts_longer_than_the_model(place: Place, _: Path) -> list[str]:
    return ["calibrate", str(DEMO), "-o", "c.safetensors", "--num-prompts", "2", "--max-length", "4096"]


@case
def convergence_of_streamed_layers(place: Place, _: Path) -> list[str]:
    command = ["calibrate", str(DEMO), "-o", "c.safetensors", "--num-prompts", "2", "--until-converged"]
    return [*command, "--stream-layers", "on"]


@case
def a_calibration_file_of_another_kind(place: Place, _: Path) -> list[str]:
    return ["calibrate", str(DEMO), "-o", "c.json", "--num-prompts", "2"]


@case
def prompts_in_an_unknown_column(place: Place, _: Path) -> list[str]:
    (place.folder / "p.jsonl").write_text(json.dumps({"question": "What is a number?"}) + "\n")
    place.words |= {"NAME": "question"}
    return ["calibrate", str(DEMO), "-o", "c.safetensors", "--prompts", "p.jsonl", "--num-prompts", "1"]


@pytest.mark.parametrize("name", CASES)
def test_each_way_out_of_a_failure_succeeds(name: str, place: Place, calibration: Path) -> None:
    command = CASES[name](place, calibration)
    before = place.folder.with_name("before")
    shutil.copytree(place.folder, before, dirs_exist_ok=True)
    hint = failure_of(command).command_hint
    for way in ways_of(hint):
        for path in place.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(before, place.folder, dirs_exist_ok=True)
        run(applied(command, way, place))
    shutil.rmtree(before)
