"""The built-in prompts: schema, balance, and no two alike."""

import json
import re
import unicodedata
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

PROMPTS = Path(__file__).parents[2] / "calib_prompts" / "prompts.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
CODE = (
    "python",
    "rust",
    "go",
    "java",
    "sql",
    "bash",
    "kotlin",
    "haskell",
    "typescript",
    "c++",
    "php",
    "swift",
    "yaml",
    "css",
)


def text_of(row: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in row["messages"])


def scripts_of(text: str) -> set[str]:
    """The scripts of letters that make up at least a tenth of a text."""
    letters = Counter(unicodedata.name(char, "?").split()[0] for char in text if char.isalpha())
    return {script for script, count in letters.items() if count > 0.1 * letters.total()}


def tokens_of(text: str) -> float:
    """About as many tokens as a large vocabulary would make."""
    wide = sum(ord(char) > 0x2FF for char in text)
    return (len(text) - wide) / 4 + wide / 1.6


def shingles(row: dict[str, Any]) -> set[int]:
    words = re.sub(r"\s+", " ", text_of(row).lower())
    return {hash(words[i : i + 16]) for i in range(0, max(1, len(words) - 15))}


def test_every_line_is_a_conversation() -> None:
    assert len(ROWS) == 512
    for row in ROWS:
        assert list(row) == ["id", "domain", "language", "messages"]
        assert re.fullmatch(rf"{row['domain']}-\d{{3}}", row["id"])
        assert re.fullmatch("[a-z]{2}", row["language"])
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(turns)), row["id"]
        for message in row["messages"]:
            assert list(message) == ["role", "content"] and message["content"].strip(), row["id"]
            assert not re.search(r"[\x00-\x08\x0b-\x1f\ufffd]", message["content"]), row["id"]
    assert len({row["id"] for row in ROWS}) == 512


@pytest.mark.parametrize("count", [128, 256, 512])
def test_every_usual_count_is_balanced(count: int) -> None:
    rows = ROWS[:count]
    domains = Counter(row["domain"] for row in rows)
    assert len(domains) == 12 and max(domains.values()) - min(domains.values()) <= 1
    languages = Counter(row["language"] for row in rows)
    assert 0.45 < languages["en"] / count < 0.55
    assert len(languages) >= 20
    assert max(n for language, n in languages.items() if language != "en") < 0.08 * count
    answered = sum(row["messages"][-1]["role"] == "assistant" for row in rows)
    assert 0.3 < answered / count < 0.6


def test_scripts_lengths_and_programming_languages() -> None:
    scripts = Counter(script for row in ROWS for script in scripts_of(text_of(row)))
    assert len([script for script, count in scripts.items() if count >= 2]) >= 14
    lengths = sorted(tokens_of(text_of(row)) for row in ROWS)
    assert lengths[0] >= 8 and 1_300 < lengths[-1] < 1_700
    assert 100 < lengths[256] < 300
    code = "\n".join(text_of(row).lower() for row in ROWS if row["domain"] == "code")
    assert sum(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code) is not None for name in CODE) >= 10


@pytest.mark.slow
def test_no_two_are_near_copies() -> None:
    sets = [(row["id"], shingles(row)) for row in ROWS]
    close = [
        (a, b)
        for (a, left), (b, right) in combinations(sets, 2)
        if len(left & right) > 0.2 * min(len(left), len(right))
    ]
    assert not close


def test_they_do_not_begin_alike() -> None:
    openings = Counter(
        " ".join(next(m["content"] for m in row["messages"] if m["role"] == "user").lower().split()[:3]) for row in ROWS
    )
    assert openings.most_common(1)[0][1] <= 3
