"""The command line: exit codes, stdout that holds data only, help, and what it does not import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import DEMO, MakeCheckpoint, llama_tensors
from typer.testing import CliRunner

from fp8pack.cli.app import app

PACK_OPTIONS = {
    *("--output", "--scheme", "--format", "--granularity", "--quant-method", "--scale-rounding", "--activations"),
    *("--calibration", "--kv-cache", "--percentile", "--margin", "--warmup", "--scales", "--rounding"),
    *("--keep-first-layers", "--keep-last-layers", "--kept-dtype", "--targets"),
    *(
        "--recipe",
        "--ignore",
        "--exclude",
        "--only",
        "--pack",
        "--target",
        "--tp",
        "--ep",
        "--gpu",
        "--strict-target",
        "--strip-prefix",
        "--keep",
        "--sensitivity",
        "--kept-dtype",
        "--copy",
        "--max-shard-size",
    ),
    *("--workers", "--max-memory", "--device", "--resume", "--no-resume", "--deadline", "--overwrite", "--dry-run"),
    *("--eval", "--json", "--quiet", "--verbose", "--help"),
}
CALIBRATE_OPTIONS = {
    *("--output", "--prompts", "--text-column", "--num-prompts", "--max-length", "--batch-size"),
    *("--all-experts", "--until-converged", "--second-moments"),
    *("--stream-layers", "--device", "--trust-remote-code", "--resume", "--no-resume", "--deadline", "--overwrite"),
    *("--json", "--quiet", "--help"),
}
MERGE_OPTIONS = {"--output", "--overwrite", "--json", "--quiet", "--help"}
CONVERT_OPTIONS = PACK_OPTIONS - {
    *("--eval", "--recipe", "--keep-first-layers", "--keep-last-layers", "--keep", "--sensitivity")
}
UNPACK_OPTIONS = {
    *("--output", "--dtype", "--copy", "--max-shard-size", "--workers", "--max-memory", "--resume", "--no-resume"),
    *("--deadline", "--overwrite", "--dry-run", "--json", "--quiet", "--verbose", "--help"),
}
INSPECT_OPTIONS = {
    *(
        "--against",
        "--fail-if",
        "--target",
        "--targets",
        "--tp",
        "--ep",
        "--gpu",
        "--tensors",
        "--only",
        "--where",
        "--sort",
    ),
    *("--explain", "--calibration", "--html", "--markdown", "--json", "--quiet", "--help"),
}
DIFF_OPTIONS = {"--fail-if", "--json", "--help"}
ENV_OPTIONS = {"--include-dir", "--json", "--help"}


def fp8pack(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fp8pack", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def options_in(text: str) -> set[str]:
    words = text.replace(",", " ").split()
    return {word for word in words if word.startswith("--") and word.strip("-")}


def test_pack_prints_the_output_path_and_nothing_else_on_stdout(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    done = fp8pack("pack", make_checkpoint(), "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    first, *rest = done.stderr.splitlines()
    assert first.startswith("model  Qwen3ForCausalLM  BF16  21 tensors")
    assert [line.split()[0] for line in rest] == ["scheme", "packed", "note", "result", "SQNR", "loads", "not", "next"]


def test_json_is_one_document_with_the_same_facts_as_the_function(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    done = fp8pack("pack", make_checkpoint(), "-o", tmp_path / "out", "--json", "-q")
    facts = json.loads(done.stdout)
    assert (facts["num_packed"], facts["recipe"]["scheme"], facts["dry_run"]) == (14, "FP8_BLOCK", False)
    assert facts["root"].startswith("blake3:")
    assert done.stderr == ""


def test_a_dry_run_lists_every_tensor_with_its_reason_and_writes_nothing(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint()
    before = set(tmp_path.rglob("*"))
    done = fp8pack("pack", source, "--dry-run", "--json", "-v")
    tensors = {tensor["name"]: tensor for tensor in json.loads(done.stdout)["tensors"]}
    assert tensors.keys() == llama_tensors().keys()
    assert all(tensor["reason"] for tensor in tensors.values())
    assert all(name in done.stderr for name in tensors)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["pack", "nowhere"], 3, "does not exist"),
        (["pack", "org/absent"], 3, "hf download org/absent"),
        (["pack", str(DEMO), "--ignore", "absent"], 2, "ignore pattern 'absent' matches no tensor"),
        (["pack", str(DEMO), "--scheme", "FP9"], 2, "FP8_BLOCK"),
        (["pack", str(DEMO), "--scheme", "fp8"], 2, "`fp8pack calibrate"),
        (["pack", str(DEMO), "--activations", "static"], 2, "`fp8pack calibrate"),
        (["pack", str(DEMO), "--kv-cache"], 2, "`fp8pack calibrate"),
        (["pack", str(DEMO), "--margin", "1"], 2, "--kv-cache"),
        (["pack", str(DEMO), "--max-memory", "much"], 2, "256MiB"),
        (["pack", str(DEMO), "--target", "lmdeploy", "--scheme", "fp8-dynamic"], 2, "LMDeploy"),
        (["pack", str(DEMO), "-o", str(DEMO / "inside")], 4, "is inside the source"),
        (["pack", str(DEMO), "-o", "/nowhere/out"], 5, "not a directory"),
        (["pack", str(DEMO), "-o", "/tmp/never", "--device", "tpu"], 2, "choose cpu, cuda"),
        (["pack", str(DEMO), "-o", "/tmp/never", "--device", "cuda:77"], 1, "torch finds no "),
        (["pack", str(DEMO), "--frobnicate"], 2, "frobnicate"),
        (["inspect", str(DEMO), "--fail-if", "sqnr<28"], 2, "METRIC<VALUE"),
        (["inspect", str(DEMO), "--fail-if", "sqnr_min<28"], 2, "--against"),
    ],
)
def test_an_expected_failure_is_a_sentence_and_an_exit_code(arguments: list[str], code: int, words: str) -> None:
    done = fp8pack(*arguments)
    assert (done.returncode, done.stdout if arguments[0] == "pack" else "") == (code, "")
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8PACK_DEBUG", "1")
    assert "Traceback" in fp8pack("pack", "nowhere").stderr


def test_values_may_be_written_with_dashes_or_underscores(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    done = fp8pack(
        "pack",
        make_checkpoint(),
        "-o",
        tmp_path / "o",
        "--scheme",
        "fp8-dynamic",
        "--quant-method",
        "compressed_tensors",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_inspect_fails_with_8_when_a_bound_is_broken(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    fp8pack("pack", source, "-o", tmp_path / "out")
    good = fp8pack("inspect", tmp_path / "out", "--against", source, "--json", "--fail-if", "sqnr_min<28")
    assert good.returncode == 0, good.stderr
    assert 31 < json.loads(good.stdout)["totals"]["sqnr_min"] < 32
    bad = fp8pack("inspect", tmp_path / "out", "--against", source, "--fail-if", "sqnr_min<40")
    assert bad.returncode == 8
    assert bad.stderr.startswith("fp8pack: sqnr_min is 31.")


@pytest.mark.slow
def test_inspect_shows_every_tensor_packed_or_not(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    fp8pack("pack", source, "-o", tmp_path / "out", "-q")
    for folder, words in ((source, "not packed: no tensor is FP8"), (tmp_path / "out", "14 packed")):
        shown = fp8pack("inspect", folder, "--tensors")
        assert shown.returncode == 0, shown.stderr
        assert words in shown.stdout
        assert all(name in shown.stdout for name in llama_tensors())


def test_packing_and_inspecting_never_import_torch(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    program = (
        "import sys; from fp8pack.cli.app import app\n"
        "app(['pack', sys.argv[1], '-o', sys.argv[2], '-q'], standalone_mode=False)\n"
        "app(['inspect', sys.argv[2], '--against', sys.argv[1]], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    source = make_checkpoint()
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "warm")]
    subprocess.run(command, capture_output=True, check=False, timeout=120)  # compiles the kernels, which takes Numba
    command[-1] = str(tmp_path / "out")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_options_are_these_and_a_new_one_needs_a_reason() -> None:
    runner = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"})
    frozen = {
        "calibrate": CALIBRATE_OPTIONS,
        "merge": MERGE_OPTIONS,
        "pack": PACK_OPTIONS,
        "unpack": UNPACK_OPTIONS,
        "convert": CONVERT_OPTIONS,
        "inspect": INSPECT_OPTIONS,
        "diff": DIFF_OPTIONS,
        "env": ENV_OPTIONS,
    }
    for command, options in frozen.items():
        assert options_in(runner.invoke(app, [command, "--help"]).stdout) == options, command


@pytest.mark.slow
def test_env_says_what_multiplies_here() -> None:
    from fp8pack.runtime.environment import environment

    found = json.loads(fp8pack("env", "--json").stdout)
    assert found == environment().to_dict()
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu"
    assert {gemm["backend"] for gemm in cpu["gemms"]} == {"reference"}
    assert cpu["gemms"][0]["tried"] == {"reference": None, "torch": None}
    shown = fp8pack("env").stdout
    assert "block:128x128" in shown
    assert "backend" in shown
    assert "torch: no GEMM with block:128x128 scales on CPUs" in shown
    folder = Path(fp8pack("env", "--include-dir").stdout.strip())
    assert (folder / "fp8pack.hpp").is_file()


def test_version_is_that_of_the_package() -> None:
    import fp8pack as package

    assert fp8pack("--version").stdout == f"fp8pack {package.__version__}\n"
