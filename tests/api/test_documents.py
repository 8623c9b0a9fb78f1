"""Each document that `--json` prints follows the schema that is published of it, and is what the function returns."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import MakeCheckpoint
from jsonschema import Draft202012Validator

import fp8pack

DOCS = Path(__file__).parents[2] / "docs"


def check(document: dict[str, Any], name: str) -> None:
    schema = json.loads((DOCS / "schemas" / name).read_text(encoding="utf-8"))
    errors = [error.message for error in Draft202012Validator(schema).iter_errors(document)]
    assert not errors, errors[:3]


def printed(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "fp8pack", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_documents_of_what_writes_and_reads_checkpoints(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    planned = printed("pack", source, "-o", tmp_path / "a", "--scheme", "FP8_DYNAMIC", "--dry-run")
    check(planned, "pack-result.schema.json")
    assert len(planned["tensors"]) == planned["num_tensors"]
    done = printed("pack", source, "-o", tmp_path / "a", "--scheme", "FP8_DYNAMIC")
    check(done, "pack-result.schema.json")
    check(
        printed("convert", tmp_path / "a", "-o", tmp_path / "b", "--quant-method", "fp8pack"), "pack-result.schema.json"
    )
    check(printed("unpack", tmp_path / "a", "-o", tmp_path / "c"), "pack-result.schema.json")
    inspected = printed("inspect", tmp_path / "a", "--against", source)
    check(inspected, "inspection.schema.json")
    returned = json.loads(json.dumps(fp8pack.inspect(tmp_path / "a", source).to_dict()))
    assert {**inspected, "tensors": [], "totals": {}} == {**returned, "tensors": [], "totals": {}}
    assert [tensor["name"] for tensor in inspected["tensors"]] == [tensor["name"] for tensor in returned["tensors"]]
    detail = printed("inspect", tmp_path / "a", inspected["tensors"][1]["name"], "--against", source)
    check(detail, "tensor-detail.schema.json")
    compared = printed("diff", tmp_path / "a", source)
    check(compared, "comparison.schema.json")
    assert compared["totals"]["num_tensors"] == fp8pack.diff(tmp_path / "a", source).totals.num_tensors
    check(printed("verify", tmp_path / "a"), "verification.schema.json")
    again = fp8pack.pack(source, tmp_path / "a", scheme="FP8_DYNAMIC").to_dict()
    assert {key: again[key] for key in ("root", "num_packed", "engines")} == {
        key: done[key] for key in ("root", "num_packed", "engines")
    }


@pytest.mark.slow
def test_documents_of_a_calibration_and_of_the_machine(tmp_path: Path) -> None:
    demo = DOCS.parent / "examples" / "demo-qwen3"
    output = tmp_path / "c.safetensors"
    check(
        printed("calibrate", demo, "-o", output, "--num-prompts", 4, "--max-length", 16),
        "calibration-summary.schema.json",
    )
    check(printed("inspect", output), "calibration-summary.schema.json")
    check(printed("env"), "environment.schema.json")


def test_the_pages_and_schemas_are_those_that_the_code_makes() -> None:
    generate = runpy.run_path(str(DOCS / "generate.py"))
    for name in generate["SCHEMAS"]:
        assert (DOCS / "schemas" / name).read_text(encoding="utf-8") == generate["schema_text"](name), name
    for name, text in generate["TEXTS"].items():
        assert (DOCS / name).read_text(encoding="utf-8") == text(), f"make docs writes {name} anew"


def test_every_public_name_is_on_the_page() -> None:
    generate = runpy.run_path(str(DOCS / "generate.py"))
    named = {name for names in generate["API"].values() for name in names}
    assert named == set(fp8pack.__all__) - {"__version__"}
