"""The documentation is true: its commands run, its links lead somewhere, it names every command, option and error."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from checkpoints import DEMO
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fp8pack import __version__, errors
from fp8pack.cli.app import app
from fp8pack.planning.recipe_file import DEFAULTS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"api.md", "cli.md", "engines.md"}
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks(page: str) -> list[str]:
    return re.findall(
        r"^```sh\n(.*?)^```$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", ["index.md", "howto.md", "coming-from.md"])
def test_the_commands_run_in_order(page: str, tmp_path: Path) -> None:
    _write_model(tmp_path / "model")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, arguments in {"python": "", "fp8pack": "-m fp8pack"}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (commands / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for block in blocks(page):
        for output in tmp_path.glob("model-FP8*"):
            shutil.rmtree(output)
        (tmp_path / "statistics.safetensors").unlink(missing_ok=True) if "-o statistics" in block else None
        command = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_the_keys_of_a_recipe_are_all_explained() -> None:
    section = (ROOT / "docs" / "howto.md").read_text(encoding="utf-8").split("## A recipe in git")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == set(DEFAULTS)


def _write_model(folder: Path) -> None:
    """The demo model in one file, with three layers of its four, and room for 32 tokens."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    shards = [load_file(path) for path in sorted(DEMO.glob("*.safetensors"))]
    tensors = {name: tensor for shard in shards for name, tensor in shard.items()}
    kept = {name: tensor for name, tensor in tensors.items() if not re.match(r"model\.layers\.3", name)}
    save_file(kept, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": config["layer_types"][:3], "max_position_embeddings": 32}
    (folder / "config.json").write_text(json.dumps(config))


def test_links_lead_to_files_and_headings() -> None:
    """As a forge shows them; those of the site are checked when it is built."""
    folders = [ROOT / name for name in ("benchmarks", "calib_prompts", "docs", "examples", "tests")]
    for page in [*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", _prose(page)):
            found = page.parent / target if target else page
            assert found.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _headings(found), f"{page.name}: {target}#{anchor}"


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _headings(page: Path) -> set[str]:
    """What a forge calls the headings of a page in links."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
        ROOT / "benchmarks" / "README.md",
        *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in GENERATED | {"log.md"}),
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_prose_is_wrapped_at_100_characters(page: Path) -> None:
    """Code, tables, and lines without a space to break at may be longer."""
    lines = [line for line in _prose(page).splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 100 and " " in line.strip().removeprefix("- ")] == []


def test_every_command_has_help_and_is_documented() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__
        assert f"fp8pack {command.name or command.callback.__name__}" in TEXT


def test_every_exit_code_is_documented() -> None:
    found = {int(code) for code in re.findall(r"^\| (\d) \|", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Fp8PackError)]
    assert {kind.exit_code for kind in kinds} <= found


def test_make_help_prints_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = {name for name in re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE)}
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert targets == {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}


def test_help_of_every_command_exits_with_0() -> None:
    for command in (
        [],
        *(
            [registered.name or registered.callback.__name__]
            for registered in app.registered_commands
            if registered.callback
        ),
    ):
        assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")]
    assert pages
    assert not [tag for page in pages for tag in re.findall(r"<(?:script|link|img)[^>]*=\"(?:https?:)?//[^>]*>", page)]


def test_the_site_has_every_page() -> None:
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert named == pages


def _steps(workflow: Path) -> list[dict[str, str]]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_workflows_are_yaml_and_call_targets_that_there_are() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert all(yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / ".github").rglob("*.yml"))
    called: set[str] = set()
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        for command in re.findall(
            r"^make (.+)$", "\n".join(step.get("run", "") for step in _steps(path)), re.MULTILINE
        ):
            called |= set(command.split()) if "${{" not in command else set()
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    called |= set(jobs["libraries"]["strategy"]["matrix"]["target"])
    assert {"check", "dist", "site", "test-newest", "test-oldest"} <= called <= targets


def test_ci_runs_the_pythons_that_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    versions = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r":: 3\.\d+$", name)]
    assert jobs["check"]["strategy"]["matrix"]["python"] == versions


@pytest.mark.parametrize(("tag", "code"), [("v0.2.0", 0), ("v0.2", 1), ("v0.1.0", 1)])
def test_a_release_has_the_notes_of_its_own_version(tag: str, code: int, tmp_path: Path) -> None:
    text = "## Unreleased\n\nnot yet\n\n## 0.2.0 - 2027-01-31\n\n### Added\n\n- this\n\n## 0.1.0 - 2026-12-01\n"
    (tmp_path / "CHANGELOG.md").write_text(text)
    (step,) = [step for step in _steps(ROOT / ".github/workflows/release.yml") if step.get("name") == "notes"]
    environment = os.environ | {"GITHUB_REF_NAME": tag}
    done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == code
    assert code or (tmp_path / "release" / "notes.md").read_text().split("\n") == [
        "",
        "### Added",
        "",
        "- this",
        "",
        "",
    ]


@pytest.mark.parametrize(("tag", "code"), [(f"v{__version__}", 0), (f"v{__version__}1", 1), (__version__, 1)])
def test_a_tag_that_is_not_the_version_is_not_released(tag: str, code: int) -> None:
    (step,) = [
        step for step in _steps(ROOT / ".github/workflows/release.yml") if step.get("name", "").startswith("the tag")
    ]
    environment = os.environ | {"GITHUB_REF_NAME": tag}
    assert subprocess.run(["bash", "-e", "-c", step["run"]], cwd=ROOT, env=environment, check=False).returncode == code
