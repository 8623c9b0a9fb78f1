"""Who loads a checkpoint, in lines."""

from typing import Any

from fp8pack.engines.judge import NO_ARCHITECTURE
from fp8pack.engines.known import ENGINES, NAMES

_WHOLE = {engine.id for engine in ENGINES if engine.loads_whole}


def engine_lines(engines: list[dict[str, Any]], command: str = "") -> list[str]:
    """Return the lines that say who loads an output, at which tensor-parallel sizes, and who does not, and why.

    command: what the flags of remedies are flags of, if it is not the command that is running.
    """
    engines = [engine for engine in engines if not _goes_without_saying(engine, engines)]
    if not engines:
        return []
    groups: dict[tuple[int, ...], list[str]] = {}
    for engine in engines:
        if engine["tp"]:
            name = NAMES[engine["engine"]] + (f" ({engine['note']})" if engine["note"] else "")
            groups.setdefault(() if engine["engine"] in _WHOLE else tuple(engine["tp"]), []).append(name)
    loads = [
        ", ".join(names) + (f" at TP {' '.join(map(str, sizes))}" if sizes else "") for sizes, names in groups.items()
    ]
    lines = [f"loads in {'; '.join(loads)}"] if loads else []
    if not loads and not any(engine.get("asked") for engine in engines):
        lines = ["loads in load_packed() only"]
    refusals: dict[tuple[str, str], list[str]] = {}
    for engine in engines:
        if not engine["tp"]:
            refusals.setdefault((engine["reason"], engine["remedy"]), []).append(NAMES[engine["engine"]])
    for (reason, remedy), names in refusals.items():
        flags = f" ({command if remedy.startswith('--') else ''}{remedy})" if remedy else ""
        lines.append(f"         not {', '.join(names)}: {reason}{flags}")
    return lines


def _goes_without_saying(engine: dict[str, Any], engines: list[dict[str, Any]]) -> bool:
    """A language model is not for ComfyUI, and a diffusion model, which names no architecture, not for the others."""
    if engine.get("asked"):
        return False
    of_language = not any(other["reason"] == NO_ARCHITECTURE for other in engines)
    return not engine["tp"] and (engine["engine"] == "comfyui") == of_language
