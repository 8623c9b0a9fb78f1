"""Parts of a page, as HTML; every text in them is escaped."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fp8pack.reading.tensor_detail import Histogram
from fp8pack.report.text import printable

STEPS = 8  # of colour in a heat map
_WIDTH, _HEIGHT, _LEFT, _FOOT = 640, 150, 8, 18
_BAR_HEIGHT, _LABEL = 22, 150


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table of any length.

    key: what a filter calls it. digits: significant ones of a number, or after the point if `fixed`. words: whether few
    different texts are in it. down: whether the largest come first at the first click.
    """

    key: str
    title: str
    number: bool = False
    digits: int | None = None
    fixed: bool = False
    percent: bool = False
    words: bool = False
    down: bool = False


def text(value: object) -> str:
    """Return a text as HTML, with control characters escaped."""
    return escape(printable(str(value)))


def section(title: str, *parts: str) -> str:
    """Return a section with a heading; empty if all of its parts are."""
    content = "\n".join(part for part in parts if part)
    return f"<section><h2>{text(title)}</h2>\n{content}\n</section>" if content else ""


def paragraph(words: str, kind: str = "") -> str:
    """Return a paragraph; `kind`: lead, note or bad."""
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Return names and values, without those that are empty."""
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in rows if value) + "</dl>"


def table(caption: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Return a short table; `numbers`: columns that are aligned to the right."""
    if not rows:
        return ""
    kinds = ['class="number"' if i in numbers else "" for i in range(len(headers))]
    head = "".join(f"<th scope=col {kind}>{text(name)}</th>" for name, kind in zip(headers, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td {kind}>{text(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def heat_map(
    caption: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[float | None]],
    format: Callable[[float], str],
    *,
    low_is_dark: bool = False,
) -> str:
    """Return a table of numbers, each with a colour between the smallest and the largest."""
    values = [value for row in rows.values() for value in row if value is not None]
    if not values:
        return ""
    low, high = min(values), max(values)

    def cell(value: float | None) -> str:
        if value is None:
            return '<td class="empty"></td>'
        share = (value - low) / (high - low) if high > low else 0.0
        step = min(STEPS - 1, int(STEPS * (1 - share if low_is_dark else share)))
        return f'<td class="h{step}">{text(format(value))}</td>'

    head = "".join(f"<th scope=col>{text(name)}</th>" for name in columns)
    body = "".join(f"<tr><th scope=row>{text(name)}</th>{''.join(map(cell, row))}</tr>" for name, row in rows.items())
    return (
        f"<div {_region('heat', caption)}><table><caption>{text(caption)}</caption>"
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(caption: str, size: tuple[int, int], said: str, drawing: str) -> str:
    """Return a drawing as SVG of this width and height; `said`: what it shows, for those who do not see it."""
    return (
        f"<figure><figcaption>{text(caption)}</figcaption>"
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{text(said)}">{drawing}</svg></figure>'
    )


def _region(kind: str, label: str) -> str:
    """A box that scrolls, also by keyboard."""
    return f'class="scroll {kind}" tabindex="0" role="region" aria-label="{text(label)}"'


def histogram(caption: str, found: Histogram | None, format: Callable[[float], str]) -> str:
    """Return a histogram as SVG, with a sentence for those who do not see it."""
    if found is None or not sum(found.counts):
        return ""
    most, count = max(found.counts), len(found.counts)
    width = (_WIDTH - 2 * _LEFT) / count
    spans = zip(found.counts, found.edges, found.edges[1:], strict=False)
    boxes = "".join(
        f'<rect x="{_LEFT + i * width:.1f}" y="{_HEIGHT * (1 - number / most):.1f}" width="{max(0.5, width - 1):.1f}" '
        f'height="{_HEIGHT * number / most:.1f}"><title>{text(format(low))} to {text(format(high))}: {number}'
        "</title></rect>"
        for i, (number, low, high) in enumerate(spans)
    )
    marks = [(0, "start"), (count // 2, "middle"), (count, "end")] if count > 1 else [(0, "start"), (1, "end")]
    ticks = "".join(
        f'<text x="{_LEFT + at * width:.1f}" y="{_HEIGHT + 14}" text-anchor="{anchor}">{text(format(found.edges[at]))}'
        "</text>"
        for at, anchor in marks
    )
    said = f"{sum(found.counts)} from {format(found.edges[0])} to {format(found.edges[-1])}; most near "
    axis = f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>'
    said += format(found.edges[found.counts.index(most)])
    return figure(caption, (_WIDTH, _HEIGHT + _FOOT), said, boxes + axis + ticks)


def bars(caption: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Return horizontal bars as SVG: a label, a length, and what is said of it."""
    most = max((value for _, value, _ in rows), default=0) or 1
    room = _WIDTH - _LABEL - 190
    lines = "".join(
        f'<text x="{_LABEL - 8}" y="{i * _BAR_HEIGHT + 15}" text-anchor="end">{text(label)}</text>'
        f'<rect x="{_LABEL}" y="{i * _BAR_HEIGHT + 4}" width="{max(1, room * value / most):.1f}" height="15"/>'
        f'<text x="{_LABEL + room * value / most + 8:.1f}" y="{i * _BAR_HEIGHT + 15}">{text(said)}</text>'
        for i, (label, value, said) in enumerate(rows)
    )
    said = "; ".join(f"{label}: {words}" for label, _, words in rows)
    return figure(caption, (_WIDTH, len(rows) * _BAR_HEIGHT + 4), said, lines) if rows else ""


def long_table(name: str, columns: Sequence[Column], values: Sequence[Sequence[object]], hint: str) -> str:
    """Return a table of any length that sorts and filters itself; `values`: by column; `name`: unique on the page."""
    if not values or not values[0]:
        return ""
    words: dict[object, int] = {}
    coded = [
        [words.setdefault(value, len(words)) for value in column] if columns[i].words else list(column)
        for i, column in enumerate(values)
    ]
    described = [
        {
            "key": column.key,
            "number": column.number,
            "words": column.words,
            "down": column.down,
            "percent": column.percent,
        }
        | ({"digits": column.digits, "fixed": column.fixed} if column.digits is not None else {})
        for column in columns
    ]
    data = {
        "columns": described,
        "values": [_finite(column) for column in coded],
        "words": [printable(str(w)) for w in words],
    }
    head = "".join(
        f'<th scope=col aria-sort=none class="{"number" if column.number else ""}">'
        f"<button type=button>{text(column.title)}</button></th>"
        for column in columns
    )
    count = len(values[0])
    return (
        f'<div class="filter"><label>Filter <input id="{name}-filter" type="search" autocomplete="off" '
        f'spellcheck="false" placeholder="{text(hint)}"></label>'
        f'<span id="{name}-count" aria-live="polite">{count}</span></div>'
        f'<div {_region("rows", name)} data-rows="{name}-data" data-filter="{name}-filter" data-count="{name}-count">'
        f'<table aria-rowcount="{count + 1}"><thead><tr>{head}</tr></thead><tbody></tbody></table></div>'
        '<noscript><p class="note">This table needs JavaScript; --json has every number.</p></noscript>'
        f'<script type="application/json" id="{name}-data">{as_json(data)}</script>'
    )


def as_json(data: object) -> str:
    """Return JSON that can stand in a script element."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")


def _finite(column: Sequence[object]) -> list[object]:
    rounded: list[object] = []
    for value in column:
        if isinstance(value, float):
            rounded.append(float(f"{value:.6g}") if math.isfinite(value) else None)
        else:
            rounded.append(printable(value) if isinstance(value, str) else value)
    return rounded
