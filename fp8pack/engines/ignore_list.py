"""The list of ignored modules, which are not quantized: how engines match its entries with module names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase


class Match(StrEnum):
    """How an ignore entry is compared with a module's name."""

    WHOLE = "the whole name"
    PARTS = "a run of its dotted parts"
    ENDS = "its first dotted parts, or its end"
    ANYWHERE = "any piece of it"
    GLOB = "a glob over it"
    GLOB_OF_PART = "a glob over it, or over one dotted part"
    REGEX = "`re:` and an expression, from its start"


@dataclass(frozen=True, slots=True)
class ListSyntax:
    """How an engine matches the ignore entries.

    lists_tied_head: a tied `lm_head` is loaded as FP8 unless it is ignored, though the file has no scale for it.
    knows_parts: a fused module is ignored if its parts are listed.
    """

    kinds: str
    matches: tuple[Match, ...]
    source: str
    lists_tied_head: bool = False
    knows_parts: bool = True


_GLOB_CHARACTERS = re.compile(r"[*?\[]")


def is_understood(entry: str, matches: Sequence[Match]) -> bool:
    """Say whether an entry is a valid pattern for an engine: a regular expression, a glob or a name."""
    if entry.startswith("re:"):
        return Match.REGEX in matches
    return not _GLOB_CHARACTERS.search(entry) or not {Match.GLOB, Match.GLOB_OF_PART}.isdisjoint(matches)


def find_listed(entries: Sequence[str], modules: Sequence[str], matches: Sequence[Match]) -> tuple[str, str] | None:
    """Return the first entry that matches one of the modules, with that module."""
    plain = [entry for entry in entries if is_understood(entry, ())]
    patterns = [entry for entry in entries if not is_understood(entry, ()) and is_understood(entry, matches)]
    names, pieces = set(plain), [match for match in matches if match in (Match.PARTS, Match.ENDS, Match.ANYWHERE)]
    for module in modules:
        parts = [module, *(module.split(".") if Match.GLOB_OF_PART in matches else ())]
        found = [part for part in parts if part in names]
        found += [entry for entry in patterns if any(_fits(entry, part) for part in parts)]
        found += [entry for match in pieces for entry in plain if _is_piece(entry, module, match)]
        if found:
            return found[0], module
    return None


def _fits(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.match(pattern[3:], name) is not None
    except re.error:
        return False


def _is_piece(entry: str, module: str, match: Match) -> bool:
    match match:
        case Match.PARTS:
            return f".{entry}." in f".{module}."
        case Match.ENDS:
            return module.startswith(f"{entry}.") or module.endswith(entry)
        case _:
            return entry in module
