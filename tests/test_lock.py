"""constraints.txt pins every package that development installs, and pyproject.toml says what the package supports."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GROUPS = PROJECT["dependency-groups"]
DECLARED = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
WITH_TOOLS = DECLARED + [Requirement(text) for group in GROUPS.values() for text in group if isinstance(text, str)]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [line.partition(";")[0].strip() for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, _, version in (line.partition("==") for line in found)}


def needed() -> set[str]:
    """Every package that the declared ones need here, by their own account."""
    found: set[str] = set()
    todo = list(WITH_TOOLS)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            todo += [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue  # of a group that is not installed here
    return found


def test_the_lock_pins_every_package() -> None:
    assert needed() <= pins("constraints.txt").keys()


def test_the_lock_names_versions_and_no_places() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)


def test_both_ends_of_each_range_are_within_it() -> None:
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    for requirement in WITH_TOOLS:
        name = canonicalize_name(requirement.name)
        assert newest[name] in requirement.specifier, name
        if name in oldest:
            floor = next(part.version for part in requirement.specifier if part.operator == ">=")
            assert oldest[name].release[:2] == Version(floor).release[:2], name


def test_what_is_imported_is_declared() -> None:
    """By the package, at the top of a file or inside a function."""
    found = set()
    for path in (ROOT / "fp8pack").rglob("*.py"):
        found |= set(re.findall(r"^\s*(?:from|import) ([a-zA-Z_]\w*)", path.read_text(encoding="utf-8"), re.MULTILINE))
    names = {"yaml": "pyyaml", "google": "protobuf"}
    ours = {canonicalize_name(requirement.name) for requirement in DECLARED}
    installed = metadata.packages_distributions()
    external = {module for module in found if module in installed and module != "fp8pack"}
    missing = {module for module in external if canonicalize_name(names.get(module, module)) not in ours}
    assert missing <= {"triton"}  # which CUDA builds of torch bring
