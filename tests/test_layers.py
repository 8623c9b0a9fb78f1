"""Imports go to a lower floor only; rooms on one floor do not import each other; every file stands in a room."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fp8pack"
FLOORS = {
    "errors": -1,  # which everything may raise
    "units": 0,
    "inputs": 0,
    "limits": 0,
    "documents": 0,
    "machine": 0,
    "quiet": 0,
    "regular_files": 0,
    "bounds": 1,
    "numerics": 1,
    "modelfacts": 2,
    "engines": 3,
    "planning": 4,
    "checkpoint": 5,
    "gemm": 5,
    "modelrun": 6,
    "packing": 7,
    "runtime": 7,
    "calibration": 7,
    "reading": 8,
    "evaluation": 8,
    "report": 9,
    "transformers": 9,
    "cli": 10,
    "__init__": 11,
    "__main__": 11,
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts)] = path
    return found


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fp8pack"):
            base = node.module.removeprefix("fp8pack").removeprefix(".")
            found |= {f"{base}.{alias.name}".removeprefix(".") for alias in node.names} | ({base} if base else set())
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("fp8pack.") for alias in node.names if alias.name.startswith("fp8pack.")}
    return {name for name in found if name in modules() or f"{name}.__init__" in modules()}


def room(module: str) -> str:
    """The room, or the file on the ground floor, that a module stands in."""
    return module.partition(".")[0]


def test_every_file_stands_in_a_room() -> None:
    assert {room(module) for module in modules()} <= FLOORS.keys()


def test_imports_go_down() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, path in modules().items()
        for imported in imports_of(path)
        if room(imported) != room(module) and FLOORS[room(imported)] >= FLOORS[room(module)]
    ]
    assert not wrong


def test_no_room_imports_itself_in_a_circle() -> None:
    graph = {module: imports_of(path) for module, path in modules().items()}

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        following = graph.get(start, set()) - seen
        return goal in following or any(reaches(module, goal, seen | following) for module in following)

    assert [module for module in graph if not module.endswith("__init__") and reaches(module, module, set())] == []


def test_nothing_but_the_edge_imports_heavy_packages_at_its_top() -> None:
    """`pack` and `inspect` on a CPU never load torch, transformers or datasets."""
    allowed = {
        "numerics.torch_codec",
        "numerics.simulate",
        "numerics.torch_dtypes",
        "numerics.replaced_forwards",
    }
    heavy_rooms = ("calibration", "evaluation", "gemm", "modelrun", "runtime", "transformers")
    allowed |= {module for module in modules() if room(module) in heavy_rooms} - {
        "calibration.merge",
        "modelrun.prompts",
        "calibration.options",
        "evaluation.evaluation",
        "evaluation.intervals",
        "evaluation.options",
    }
    wrong = []
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            heavy = {name.partition(".")[0] for name in names} & {"torch", "transformers", "datasets"}
            if heavy and module not in allowed:
                wrong.append(f"{module} imports {heavy}")
    assert not wrong
