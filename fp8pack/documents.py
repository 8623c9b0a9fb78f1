"""Results as JSON documents, and as HTML for notebooks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from html import escape
from os import PathLike, fspath
from typing import Any

SCHEMA = 1  # of every document that --json prints
_MAX_SHOWN = 4


class Document:
    """A result: a frozen dataclass that `--json` prints as it is."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, as `--json` prints it; docs/schemas/ says what each key means."""
        return {"schema": SCHEMA, **as_data(self)}

    def __repr__(self) -> str:
        """Return the class and its fields; of a long list, how many entries it has."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={_brief(value)}' for name, value in values)})"


def _brief(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > _MAX_SHOWN:
        return f"<{len(value)} of {type(value[0]).__name__}>"
    return repr(value)


def as_data(value: Any) -> Any:
    """Return dataclasses as dictionaries, paths and enumerations as text, and sequences as lists, all the way down."""
    if is_dataclass(value):
        return {field.name: as_data(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)  # plain data already, from JSON or for it
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [as_data(item) for item in value]
    return value


def html_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for a notebook; everything in it is text."""
    cells = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr>{''.join(f'<td style=text-align:left>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<div><p>{escape(title)}</p><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
