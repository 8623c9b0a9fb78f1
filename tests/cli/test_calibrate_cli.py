"""`fp8pack calibrate` and `fp8pack merge` on the command line: exit codes, sentences, and what goes to stdout."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DEMO

from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.cli.app import main
from fp8pack.planning.calibration import value_of

WORDS = (DEMO / "heldout.txt").read_text().split()


@dataclass
class Ran:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        """The one line that says what went wrong."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("fp8pack: ")]
        assert "Traceback" not in self.stderr
        assert len(lines) == 1, self.stderr
        assert len(lines[0]) < 2000
        assert self.stdout == ""
        return lines[0]


Fp8Pack = Callable[..., Ran]


@pytest.fixture
def fp8pack(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Fp8Pack]:
    """Return a function that runs the command line in this process, up to its exit code."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["fp8pack", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    yield run
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be spoilt."""
    shutil.copytree(DEMO, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", [f"{i} is a number" for i in range(4)])


def write_prompts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


# What is printed.


def test_stdout_is_the_path_alone(fp8pack: Fp8Pack, prompts: Path, tmp_path: Path) -> None:
    ran = fp8pack("calibrate", DEMO, "--prompts", prompts, "-o", tmp_path / "c.safetensors")
    assert (ran.code, ran.stdout) == (0, f"{tmp_path / 'c.safetensors'}\n")
    assert "seen     4 prompts" in ran.stderr
    assert "widest" in ran.stderr
    assert read_calibration(tmp_path / "c.safetensors").options["batch_size"] == 1


def test_json_is_exactly_one_document(fp8pack: Fp8Pack, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "c.safetensors"
    ran = fp8pack("calibrate", DEMO, "--prompts", prompts, "-o", output, "--json", "--max-length", "3")
    facts = json.loads(ran.stdout)
    assert ran.code == 0
    assert facts["output"] == str(output)
    assert facts["architecture"] == "Qwen3ForCausalLM"
    assert (facts["num_prompts"], facts["num_tokens"], facts["options"]["max_length"]) == (4, 12, 3)
    assert not facts["already_complete"]
    json.dumps(facts, allow_nan=False)
    again = json.loads(
        fp8pack("calibrate", DEMO, "--prompts", prompts, "-o", output, "--json", "--max-length", "3").stdout
    )
    assert again["already_complete"]
    same = facts.keys() - {"seconds", "peak_memory", "already_complete"}
    assert {key: again[key] for key in same} == {key: facts[key] for key in same}


def test_quiet_says_nothing_but_the_path(fp8pack: Fp8Pack, prompts: Path, tmp_path: Path) -> None:
    ran = fp8pack("calibrate", DEMO, "--prompts", prompts, "-o", tmp_path / "c.safetensors", "-q")
    assert (ran.code, ran.stdout, ran.stderr) == (0, f"{tmp_path / 'c.safetensors'}\n", "")
    ran = fp8pack("merge", tmp_path / "c.safetensors", "-o", tmp_path / "d.safetensors", "-q")
    assert (ran.code, ran.stdout, ran.stderr) == (0, f"{tmp_path / 'd.safetensors'}\n", "")


@pytest.mark.slow
def test_nothing_of_other_packages_is_printed(prompts: Path, tmp_path: Path) -> None:
    """Some warn when they are imported, torchao of its kernels, say: only a process of its own shows that."""
    command = [
        sys.executable,
        "-m",
        "fp8pack",
        "calibrate",
        DEMO,
        "--prompts",
        prompts,
        "-o",
        tmp_path / "c.safetensors",
    ]
    done = subprocess.run([*map(str, command), "-q"], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_output_lies_beside_the_model_by_default(fp8pack: Fp8Pack, model: Path, prompts: Path) -> None:
    ran = fp8pack("calibrate", f"{model}/", "--prompts", prompts, "-q")
    assert (ran.code, ran.stdout) == (0, f"{model.parent / 'model-calibration.safetensors'}\n")


@pytest.mark.slow
def test_few_and_many_prompts_are_noted(fp8pack: Fp8Pack, prompts: Path, tmp_path: Path) -> None:
    ran = fp8pack("calibrate", DEMO, "--prompts", prompts, "-o", tmp_path / "c.safetensors", "--num-prompts", "10")
    assert "has 4 prompts, fewer than 10" in ran.stderr
    assert "4 prompts: use 128 to 512" in ran.stderr
    many = write_prompts(tmp_path / "many.jsonl", [f"{i}" for i in range(520)])
    flags = ("-o", tmp_path / "d.safetensors", "--max-length", "8", "--batch-size", "64")
    ran = fp8pack("calibrate", DEMO, "--prompts", many, "--num-prompts", "513", *flags)
    assert ran.code == 0
    assert "513 prompts: use 128 to 512" in ran.stderr
    facts = json.loads(
        fp8pack(
            "calibrate",
            DEMO,
            "--prompts",
            many,
            "--num-prompts",
            "128",
            *flags[2:],
            "-o",
            tmp_path / "e.safetensors",
            "--json",
        ).stdout
    )
    assert not any("128 to 512" in note for note in facts["notes"])


def test_only_prompts_that_are_longer_are_said_to_be_cut(fp8pack: Fp8Pack, prompts: Path, tmp_path: Path) -> None:
    def notes(length: int) -> list[str]:
        output = tmp_path / f"{length}.safetensors"
        ran = fp8pack("calibrate", DEMO, "--prompts", prompts, "-o", output, "--json", "--max-length", f"{length}")
        facts = json.loads(ran.stdout)
        assert facts["num_tokens"] == 4 * length
        return [note for note in facts["notes"] if "truncated" in note]

    longest = json.loads(
        fp8pack("calibrate", DEMO, "--prompts", prompts, "-o", tmp_path / "all.safetensors", "--json").stdout
    )["num_tokens"]
    assert longest % 4 == 0, "all of one length"
    assert notes(longest // 4 - 1) == [f"4 prompts are truncated to {longest // 4 - 1} tokens"]
    assert notes(longest // 4) == []


def test_prompts_that_come_twice_are_run_once_and_said(fp8pack: Fp8Pack, tmp_path: Path) -> None:
    twice = write_prompts(tmp_path / "p.jsonl", ["the same", "another", "the same"])
    ran = fp8pack("calibrate", DEMO, "--prompts", twice, "-o", tmp_path / "c.safetensors", "--json")
    facts = json.loads(ran.stdout)
    assert facts["num_prompts"] == 2
    assert "1 duplicate prompts are skipped" in facts["notes"]


@pytest.mark.slow
def test_until_converged_stops_when_nothing_grows(fp8pack: Fp8Pack, tmp_path: Path) -> None:
    """Prompts that are beginnings of the first one: no amax can grow after it."""
    texts = [" ".join(WORDS[: 100 - i]) for i in range(90)]
    path = write_prompts(tmp_path / "p.jsonl", texts)
    output = tmp_path / "c.safetensors"
    command = ("calibrate", DEMO, "--prompts", path, "-o", output, "--num-prompts", "90", "--max-length", "200")
    ran = fp8pack(*command, "--until-converged", "--json")
    facts = json.loads(ran.stdout)
    assert facts["num_prompts"] == 65
    assert (facts["growth_last_quarter"], facts["num_growing"]) == (pytest.approx(1.0, abs=0.02), 0)
    assert json.loads(fp8pack(*command, "--until-converged", "--json").stdout)["already_complete"]
    assert "--overwrite" in fp8pack(*command).message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c.safetensors", "p.jsonl"]


@pytest.mark.slow
def test_until_converged_goes_on_while_something_grows(fp8pack: Fp8Pack, tmp_path: Path) -> None:
    """It stops after the first prompt at which no site's amax has grown by more than 1 % over 64 prompts."""
    path = write_prompts(tmp_path / "p.jsonl", [" ".join(WORDS[i : i + 2]) for i in range(100)])
    command = ("calibrate", DEMO, "--prompts", path, "--num-prompts", "100", "-q", "-o")
    fp8pack(*command, tmp_path / "all.safetensors")
    sites = read_calibration(tmp_path / "all.safetensors").sites
    histories = [[value_of(int(amax)) for amax in site.prompt_amax] for site in sites]
    settled = [
        n
        for n in range(65, len(histories[0]))
        if all(max(history[:n]) <= 1.01 * max(history[: n - 64]) for history in histories)
    ]
    fp8pack(*command, tmp_path / "stopped.safetensors", "--until-converged")
    stopped = read_calibration(tmp_path / "stopped.safetensors")
    assert len(stopped.prompts) == min([*settled, len(histories[0])]) > 65


def test_merge_says_what_it_joined(fp8pack: Fp8Pack, tmp_path: Path) -> None:
    for name in ("a", "b"):
        path = write_prompts(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(2)])
        fp8pack("calibrate", DEMO, "--prompts", path, "-o", tmp_path / f"{name}.safetensors", "-q")
    a, b, c = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "c"))
    ran = fp8pack("merge", a, b, "-o", c)
    assert (ran.code, ran.stdout) == (0, f"{c}\n")
    assert "seen     4 prompts" in ran.stderr
    facts = json.loads(fp8pack("merge", b, a, "-o", c, "--overwrite", "--json").stdout)
    assert (facts["num_merged"], facts["num_prompts"]) == (2, 4)
    assert fp8pack("merge", a, b, "-o", c).code == 4
    again = fp8pack("merge", a, a, "-o", tmp_path / "d.safetensors")
    assert again.code == 3
    assert "contain the same prompt" in again.message
    assert fp8pack("merge", a, tmp_path / "absent.safetensors", "-o", tmp_path / "d.safetensors").code == 3
    nowhere = fp8pack("merge", a, b, "-o", tmp_path / "absent" / "d.safetensors")
    assert nowhere.code == 5
    assert nowhere.message


# What is refused.


def usage(fp8pack: Fp8Pack, words: str, *arguments: str | Path) -> None:
    ran = fp8pack(*arguments)
    assert (ran.code, ran.stdout) == (2, "")
    assert words in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.stderr


WRONG_USE: dict[str, tuple[str, ...]] = {
    "max length '0'": ("--max-length", "0"),
    "max length '-5'": ("--max-length", "-5"),
    "num prompts '0'": ("--num-prompts", "0"),
    "batch size '0'": ("--batch-size", "0"),
    "choose auto, cpu, cuda": ("--device", "tpu"),
    "choose auto, on, off": ("--stream-layers", "maybe"),
    "is not a .safetensors file": ("-o", "/tmp/never.json"),
    "write 50m": ("--deadline", "soon"),
    "--frobnicate": ("--frobnicate",),
    "device 'cpu:banana'": ("--device", "cpu:banana"),
    "--stream-layers off": ("--stream-layers", "on", "--until-converged"),
}


@pytest.mark.parametrize("words", WRONG_USE)
def test_wrong_use_ends_with_2(words: str, fp8pack: Fp8Pack, tmp_path: Path, prompts: Path) -> None:
    usage(fp8pack, words, "calibrate", DEMO, "--prompts", prompts, "-o", tmp_path / "c.safetensors", *WRONG_USE[words])
    assert not (tmp_path / "c.safetensors").exists()


def test_cuda_where_there_is_none_ends_with_1(
    fp8pack: Fp8Pack, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ("--prompts", prompts, "-o", tmp_path / "c.safetensors", "--device", "cuda")
    ran = fp8pack("calibrate", DEMO, *flags)
    assert (ran.code, "torch finds no CUDA device" in ran.message) == (1, True)


def test_a_merge_of_nothing_or_without_an_output_ends_with_2(fp8pack: Fp8Pack, tmp_path: Path) -> None:
    assert fp8pack("merge", "-o", tmp_path / "c.safetensors").code == 2
    assert fp8pack("merge", tmp_path / "a.safetensors").code == 2


def no_architecture(config: dict[str, Any]) -> None:
    del config["architectures"]


def remote(config: dict[str, Any]) -> None:
    config.update(
        architectures=["EvilForCausalLM"],
        model_type="evil",
        auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"},
    )


def remote_model(config: dict[str, Any]) -> None:
    config.update(architectures=["EvilForCausalLM"], auto_map={"AutoModelForCausalLM": "evil.EvilForCausalLM"})


def set_to(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(changes)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no-architecture": (no_architecture, "architecture"),
    "unknown-architecture": (set_to(architectures=["FrobForCausalLM"]), "has no FrobForCausalLM"),
    "unknown-model-type": (set_to(architectures=["FrobForCausalLM"], model_type="frob"), "frob"),
    "no-model-type": (lambda config: config.pop("model_type"), "config.json"),
    "a-class-that-is-no-model": (set_to(architectures=["AutoConfig"]), "AutoConfig"),
    "a-name-of-the-package": (set_to(architectures=["__name__"]), "__name__"),
    "the-base-of-all-models": (set_to(architectures=["PreTrainedModel"]), "PreTrainedModel"),
    "the-model-of-another-config": (set_to(architectures=["BertModel"]), "BertModel"),
    "code-of-its-own": (remote, "--trust-remote-code"),
    "a-model-with-code-of-its-own": (remote_model, "--trust-remote-code"),
    "a-size-that-is-text": (set_to(hidden_size="big"), "model"),
    "a-size-that-is-negative": (set_to(hidden_size=-256), "model"),
    "another-size": (set_to(hidden_size=128), "in the checkpoint"),
    "more-layers": (set_to(num_hidden_layers=5, layer_types=["full_attention"] * 5), "has no model.layers.4"),
    "an-unknown-activation": (set_to(hidden_act="frob"), "frob"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_cannot_be_run_is_refused_with_a_sentence(
    name: str, fp8pack: Fp8Pack, model: Path, prompts: Path, tmp_path: Path
) -> None:
    change, words = CONFIGS[name]
    edit_json(model / "config.json", change)
    (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    ran = fp8pack("calibrate", model, "--prompts", prompts, "-o", tmp_path / "c.safetensors")
    assert ran.code == 3
    assert words in ran.message
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "c.safetensors").exists()
    assert not any("fp8pack-partial" in path.name for path in tmp_path.iterdir())


def without(*names: str) -> Callable[[Path], None]:
    def remove(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return remove


def lora(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    shutil.copy(next(DEMO.glob("*.safetensors")), model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text("{}")


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "no-config": (without("config.json"), "no config.json"),
    "no-tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
    "a-broken-tokenizer": (lambda model: (model / "tokenizer.json").write_text("{}") and None, "no tokenizer"),
    "a-lora-adapter": (lora, "adapter"),
    "a-broken-config": (lambda model: (model / "config.json").write_text("{") and None, "config.json"),
    "a-missing-shard": (lambda model: sorted(model.glob("*.safetensors"))[0].unlink(), "is missing"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_directory_that_lacks_something_is_refused_with_a_sentence(
    name: str, fp8pack: Fp8Pack, model: Path, prompts: Path, tmp_path: Path
) -> None:
    spoil, words = SPOILT[name]
    spoil(model)
    ran = fp8pack("calibrate", model, "--prompts", prompts, "-o", tmp_path / "c.safetensors")
    assert ran.code == 3
    assert words in ran.message


@pytest.mark.parametrize("with_file", [True, False])
def test_code_of_a_tokenizer_is_not_run(
    with_file: bool, fp8pack: Fp8Pack, model: Path, prompts: Path, tmp_path: Path
) -> None:
    auto_map = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
    edit_json(model / "tokenizer_config.json", set_to(tokenizer_class="EvilTokenizer", auto_map=auto_map))
    (model / "evil.py").write_text("raise SystemExit(99)\n")
    if not with_file:
        (model / "tokenizer.json").unlink()
    ran = fp8pack("calibrate", model, "--prompts", prompts, "-o", tmp_path / "c.safetensors")
    assert ran.code == 0 if with_file else ran.code == 3 and "tokenizer" in ran.message


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 3, "does not exist"),
        (["org/absent"], 3, "hf download org/absent"),
        ([str(DEMO / "config.json")], 3, "not a .safetensors file"),
        ([str(next(DEMO.glob("*.safetensors")))], 3, "no config.json"),
        ([str(DEMO), "--prompts", "org/absent"], 3, "hf download --repo-type dataset org/absent"),
        ([str(DEMO), "--prompts", "absent.jsonl"], 3, "absent.jsonl"),
        ([str(DEMO), "-o", str(DEMO / "c.safetensors")], 4, "is inside the source"),
        ([str(DEMO), "-o", "/nowhere/c.safetensors"], 5, "not a directory"),
    ],
)
def test_what_is_not_there_is_refused_with_a_sentence(
    arguments: list[str], code: int, words: str, fp8pack: Fp8Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = fp8pack("calibrate", *arguments)
    assert ran.code == code
    assert words in ran.message
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_hold_nothing_are_refused(fp8pack: Fp8Pack, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "p.jsonl", [])
    ran = fp8pack("calibrate", DEMO, "--prompts", path, "-o", tmp_path / "c.safetensors")
    assert ran.code == 3
    assert "has no prompt" in ran.message


def test_a_weight_that_is_not_finite_is_a_sentence(
    fp8pack: Fp8Pack, model: Path, prompts: Path, tmp_path: Path
) -> None:
    shard = sorted(model.glob("*.safetensors"))[-1]
    with shard.open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x80\x7f")
    ran = fp8pack("calibrate", model, "--prompts", prompts, "-o", tmp_path / "c.safetensors")
    assert ran.code == 3
    assert "is NaN or infinite" in ran.message
    assert not (tmp_path / "c.safetensors").exists()


# The interface.


def test_help_and_wrong_use_do_not_import_torch() -> None:
    program = (
        "import contextlib, sys; from fp8pack.cli.app import app\n"
        "for arguments in (['calibrate', '--help'], ['merge', '--help'], ['calibrate', 'x', '--stream-layers', 'y']):\n"
        "    with contextlib.suppress(SystemExit, Exception): app(arguments, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numba', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_merge_does_not_import_torch(fp8pack: Fp8Pack, prompts: Path, tmp_path: Path) -> None:
    """It joins files: what a machine without torch can do as fast."""
    fp8pack("calibrate", DEMO, "--prompts", prompts, "-o", tmp_path / "c.safetensors", "-q")
    program = (
        "import sys; from fp8pack.cli.app import app\n"
        "app(['merge', sys.argv[1], '-o', sys.argv[2], '-q'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "c.safetensors"), str(tmp_path / "d.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
