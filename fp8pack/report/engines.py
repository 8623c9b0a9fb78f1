"""The engines that load a checkpoint, as lines of text."""

from collections.abc import Sequence

from fp8pack.engines.judge import NO_ARCHITECTURE, EngineVerdict
from fp8pack.engines.known import BY_ID, NAMES, id_of


def engine_lines(verdicts: Sequence[EngineVerdict], *, asked: Sequence[str] = (), command: str = "") -> list[str]:
    """Return the lines that say which engines load an output, at which tensor-parallel sizes, and why others do not.

    asked: the engines that were asked for. command: what goes before the options of a remedy, if they are of another
    command.
    """
    asked = tuple(map(id_of, asked))
    verdicts = [verdict for verdict in verdicts if not _goes_without_saying(verdict, verdicts, asked)]
    if not verdicts:
        return []
    groups: dict[tuple[int, ...], list[str]] = {}
    for verdict in verdicts:
        if verdict.tp:
            name = _name(verdict, asked) + (f" ({verdict.note})" if verdict.note else "")
            groups.setdefault(() if BY_ID[verdict.engine].loads_whole else verdict.tp, []).append(name)
    loads = [
        ", ".join(names) + (f" at TP {' '.join(map(str, sizes))}" if sizes else "") for sizes, names in groups.items()
    ]
    lines = [f"loads in {'; '.join(loads)}"] if loads else []
    if not loads and not asked:
        lines = ["loads in load_packed() only"]
    unknown: dict[str, list[str]] = {}
    refusals: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        if verdict.loads is None:
            unknown.setdefault(verdict.reason, []).append(_name(verdict, asked))
        elif not verdict.loads:
            refusals.setdefault((verdict.reason, verdict.remedy), []).append(_name(verdict, asked))
    lines += [f"         not known: {', '.join(names)}: {reason}" for reason, names in unknown.items()]
    for (reason, remedy), names in refusals.items():
        options = f" ({command if remedy.startswith('--') else ''}{remedy})" if remedy else ""
        lines.append(f"         not {', '.join(names)}: {reason}{options}")
    return lines


def _name(verdict: EngineVerdict, asked: Sequence[str]) -> str:
    """An engine that was asked for is named with the version that was read."""
    return verdict.version if verdict.engine in asked and verdict.version else NAMES[verdict.engine]


def _goes_without_saying(verdict: EngineVerdict, verdicts: Sequence[EngineVerdict], asked: Sequence[str]) -> bool:
    """A language model is not for ComfyUI, and a diffusion model, which names no architecture, not for the others."""
    if verdict.engine in asked:
        return False
    of_language = not any(other.reason == NO_ARCHITECTURE for other in verdicts)
    return verdict.loads is False and (verdict.engine == "comfyui") == of_language
