"""Prompts: every shape of a row, every kind of file, and templates that nobody checked; never the network."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from checkpoints import DEMO

from fp8pack.errors import Fp8PackError, InputError
from fp8pack.modelrun.prompts import BUILT_IN, Prompt, load_prompts, parse_row, tokenize

USER, ASSISTANT, SYSTEM = (
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Scattering."},
    {"role": "system", "content": "Be brief."},
)
PARTS = [{"type": "image"}, {"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}]


def ids_of(prompts: list[Prompt], tokenizer: Any, max_length: int) -> list[list[int]]:
    return [ids for ids, _ in tokenize(prompts, tokenizer, max_length)]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any look at the network fail the test."""

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def demo_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


@pytest.fixture
def tokenizer(demo_tokenizer: Any) -> Iterator[Any]:
    """The tokenizer of the demo model, whose template each test may set."""
    before = demo_tokenizer.chat_template
    yield demo_tokenizer
    demo_tokenizer.chat_template = before


def refusal(call: Callable[[], object], *words: str) -> str:
    """Return the sentence with which a call refuses its input."""
    with pytest.raises(Fp8PackError) as caught:
        call()
    message = caught.value.command_line
    assert type(caught.value) is InputError
    assert len(message.splitlines()) == 1
    assert len(message) < 2000
    for word in words:
        assert word in message
    return message


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(place: str | Path, count: int = 100) -> list[Any]:
    return [prompt.content for prompt in load_prompts([str(place)], count)]


# Rows.

SHAPES: dict[str, tuple[dict[str, Any], str | list[dict[str, str]]]] = {
    "text": ({"text": "a b"}, "a b"),
    "text-with-others": ({"id": 3, "text": "a b", "meta": {}}, "a b"),
    "text-keeps-its-blanks": ({"text": " a\n"}, " a\n"),
    "article": ({"article": "a", "highlights": "b"}, "a"),
    "empty-text-and-article": ({"text": "", "article": "a"}, "a"),
    "prompt": ({"prompt": "a"}, "a"),
    "prompt-and-completion": ({"prompt": "a", "completion": "b"}, "a\n\nb"),
    "prompt-without-completion": ({"prompt": "a", "completion": None}, "a"),
    "prompt-of-messages": ({"prompt": [USER]}, [USER]),
    "messages": ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
    "messages-before-text": ({"text": "a", "messages": [USER]}, [USER]),
    "messages-with-more-fields": ({"messages": [{**USER, "weight": 1, "name": None}]}, [USER]),
    "empty-messages-and-text": ({"messages": [], "text": "a"}, "a"),
    "conversations": ({"conversations": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "conversations-from-value": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Why is the sky blue?"},
                {"from": "gpt", "value": "Scattering."},
            ]
        },
        [SYSTEM, USER, ASSISTANT],
    ),
    "instruction": ({"instruction": "a"}, "a"),
    "instruction-output": ({"instruction": "a", "output": "c"}, "a\n\nc"),
    "instruction-empty-input-output": ({"instruction": "a", "input": "", "output": "c"}, "a\n\nc"),
    "instruction-input-output": ({"instruction": "a", "input": "b", "output": "c"}, "a\n\nb\n\nc"),
    "parts": ({"messages": [{"role": "user", "content": PARTS}]}, [{"role": "user", "content": "What is\nthis?"}]),
    "only-an-image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        [{"role": "user", "content": ""}],
    ),
    "an-empty-answer": (
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        [USER, {"role": "assistant", "content": ""}],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_of_each_shape_is_read(name: str, tmp_path: Path) -> None:
    row, expected = SHAPES[name]
    assert parse_row(row, "here") == Prompt("here", expected)
    assert texts(write_lines(tmp_path / "p.jsonl", row, row)) == [expected, expected]


NO_PROMPTS: dict[str, Any] = {
    "nothing": {},
    "other-keys": {"question": "a", "answer": "b"},
    "empty-text": {"text": ""},
    "blank-text": {"text": " \n\t"},
    "blank-prompt": {"prompt": "  "},
    "text-is-a-number": {"text": 3},
    "text-is-null": {"text": None},
    "text-is-a-list": {"text": ["a"]},
    "a-list": [1, 2],
    "a-number": 3,
    "null": None,
    "text-itself": "hello",
    "messages-are-text": {"messages": "hello"},
    "messages-are-numbers": {"messages": [1]},
    "messages-are-an-object": {"messages": {"role": "user", "content": "a"}},
    "a-message-without-content": {"messages": [{"role": "user"}]},
    "a-message-without-role": {"messages": [{"content": "a"}]},
    "a-message-whose-content-is-null": {"messages": [{"role": "user", "content": None}]},
    "a-message-whose-content-is-an-object": {"messages": [{"role": "user", "content": {"text": "a"}}]},
    "a-message-whose-role-is-a-list": {"messages": [{"role": ["user"], "content": "a"}]},
    "many-keys": {f"key {i} " * 10: i for i in range(1000)},
    "keys-with-lines": {"a\nfp8pack: all is well": 1},
}

BLANK = ("nothing", "empty-text", "blank-text", "blank-prompt", "text-is-null")


@pytest.mark.parametrize("name", NO_PROMPTS)
def test_a_row_that_is_no_prompt_is_refused_with_its_place_and_a_blank_one_is_passed_over(
    name: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"text": "a"}, NO_PROMPTS[name])
    if name in BLANK:
        assert [prompt.content for prompt in load_prompts([str(path)], 10)] == ["a"]
        return
    refusal(lambda: load_prompts([str(path)], 10), "p.jsonl, line 2")


def test_a_row_that_is_no_prompt_names_the_shapes_that_are(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"question": "a"})
    refusal(lambda: load_prompts([str(path)], 10), "question", "text", "messages", "conversations", "instruction")


@pytest.mark.parametrize(
    ("row", "content"),
    [({"text": "a", "question": "b"}, "b"), ({"text": "a", "question": [USER]}, [USER])],
    ids=["text", "messages"],
)
def test_a_column_that_is_named_goes_before_those_that_are_known(
    row: dict[str, Any], content: str | list[dict[str, str]], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "p.jsonl", row)
    assert [prompt.content for prompt in load_prompts([str(path)], 10, text_column="question")] == [content]


@pytest.mark.parametrize("value", [None, 1, "", [], {"a": 1}], ids=["null", "number", "empty", "nothing", "object"])
def test_a_column_without_text_is_a_sentence(value: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"text": "a", "question": value})
    refusal(lambda: load_prompts([str(path)], 10, text_column="question"), "line 1", "'question'", "'text'")


@pytest.mark.parametrize("row", [{"prompt": "   "}, {"messages": "hello"}])
def test_a_blank_prompt_is_not_mistaken_for_a_conversation(row: dict[str, Any]) -> None:
    message = refusal(lambda: parse_row(row, "here"), "here")
    assert "from and value" not in message


# JSON lines.


def test_as_many_as_are_asked_for_are_read_and_no_more(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", *({"text": f"t{i}"} for i in range(5)), {"bad": 1})
    assert texts(path, 3) == ["t0", "t1", "t2"]
    assert texts(path, 5) == [f"t{i}" for i in range(5)]
    refusal(lambda: texts(path, 6), "line 6")


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_blank_lines_and_other_line_ends_are_no_prompts(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"p{suffix}"
    path.write_bytes(b'\n  \n{"text": "a"}\r\n\n{"text": "\xc3\xa9\\u2028"}')
    found = load_prompts([str(path)], 9)
    assert [prompt.content for prompt in found] == ["a", "é\u2028"]
    assert [prompt.name for prompt in found] == [f"p{suffix}, line 3", f"p{suffix}, line 5"]


def test_an_empty_file_holds_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("")
    assert load_prompts([str(tmp_path / "p.jsonl")], 3) == []


BAD_BYTES: dict[str, bytes] = {
    "not-JSON": b"{text: a}\n",
    "cut-off": b'{"text": "a',
    "two-in-a-line": b'{"text": "a"} {"text": "b"}\n',
    "a-pretty-list": b'[\n  {"text": "a"}\n]\n',
    "a-list-in-a-line": b'[{"text": "a"}]\n',
    "deep-lists": b"[" * 200_000,
    "deep-objects": b'{"a":' * 200_000,
    "deep-messages": b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
    "a-number-of-many-digits": b'{"text": ' + b"9" * 10_000 + b"}\n",
    "latin-1": '{"text": "é"}\n'.encode("latin-1"),
    "utf-16": '{"text": "é"}\n'.encode("utf-16"),
    "utf-32": '{"text": "é"}\n'.encode("utf-32"),
    "zeros": b"\0" * 100,
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bytes_that_are_no_json_lines_are_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(BAD_BYTES[name])
    refusal(lambda: load_prompts([str(path)], 10), "p.jsonl")


def test_a_byte_order_mark_is_no_obstacle_or_named(tmp_path: Path) -> None:
    """As Windows editors write it: either it is read past, or the sentence says what is wrong with the encoding."""
    path = tmp_path / "p.jsonl"
    path.write_bytes('{"text": "é"}\n'.encode("utf-8-sig"))
    try:
        assert texts(path) == ["é"]
    except InputError as error:
        assert "BOM" in str(error) or "byte order mark" in str(error)


def test_a_directory_or_an_unreadable_place_with_the_name_of_json_lines_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").mkdir()
    refusal(lambda: load_prompts([str(tmp_path / "p.jsonl")], 3), "p.jsonl")
    refusal(lambda: load_prompts([str(tmp_path / "absent.jsonl")], 3), "absent.jsonl")


def test_the_built_in_prompts_are_512_of_known_shape_and_all_different() -> None:
    found = load_prompts([BUILT_IN], 1000)
    assert len(found) == 512
    assert len({json.dumps(prompt.content) for prompt in found}) == len(found)


# Data sets.

ROWS = [{"text": "a", "n": 1}, {"text": "b, c", "n": 2}, {"text": "é", "n": 3}]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    from pyarrow import csv, feather, parquet

    table = pa.Table.from_pylist(rows)
    match path.suffix:
        case ".parquet":
            parquet.write_table(table, path)
        case ".csv":
            csv.write_csv(table, path)
        case ".tsv":
            csv.write_csv(table, path, csv.WriteOptions(delimiter="\t"))
        case ".arrow":
            feather.write_feather(table, path, compression="uncompressed")
        case ".txt":
            path.write_text("\n\n".join(row["text"] for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".txt"])
def test_a_file_of_a_data_set_is_read(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / f"p{suffix}", ROWS)
    found = load_prompts([str(path)], 10)
    assert [prompt.content for prompt in found] == ["a", "b, c", "é"]
    assert all(prompt.name.startswith(f"p{suffix}, row ") for prompt in found)
    monkeypatch.chdir(tmp_path)
    assert texts(f"p{suffix}") == ["a", "b, c", "é"]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".parquet", ".txt"])
def test_no_more_rows_of_a_data_set_are_read_than_are_asked_for(suffix: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / f"p{suffix}", ROWS)
    assert texts(path, 2) == ["a", "b, c"]
    assert texts(path, 0) == []


def test_conversations_in_parquet_are_read(tmp_path: Path) -> None:
    path = write_table(tmp_path / "p.parquet", [{"messages": [USER, ASSISTANT]}, {"messages": [USER]}])
    assert texts(path) == [[USER, ASSISTANT], [USER]]


def test_blank_rows_of_a_table_are_passed_over_as_blank_lines_of_a_text_are(tmp_path: Path) -> None:
    """As in wikitext, the data set that is used most."""
    path = write_table(tmp_path / "p.parquet", [{"text": ""}, {"text": "a"}, {"text": "\n"}, {"text": "b"}])
    assert texts(path) == ["a", "b"]


def test_a_name_with_the_signs_of_a_pattern_is_a_name(tmp_path: Path) -> None:
    path = write_table(tmp_path / "part[1].csv", ROWS)
    assert texts(path) == ["a", "b, c", "é"]


DAMAGED: dict[str, bytes] = {
    "p.parquet": b"PAR1 this is no table PAR1",
    "empty.parquet": b"",
    "p.csv": b"text\n\xff\xfe\n",
    "empty.csv": b"",
    "ragged.csv": b'text\n"a\n',
    "p.txt": b"\xff\xfe\x00",
    "p.arrow": b"ARROW1",
    "zeros.parquet": bytes(1000),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    try:
        assert load_prompts([str(path)], 3) in ([], [Prompt("ragged.csv, row 1", "a\n")])
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 2000
        assert name in str(error)


def test_a_table_without_prompts_names_the_row(tmp_path: Path) -> None:
    path = write_table(tmp_path / "p.parquet", [{"question": "a"}])
    refusal(lambda: load_prompts([str(path)], 3), "p.parquet, row 1", "question")


def test_a_file_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refusal(lambda: load_prompts([str(tmp_path / "p.pkl")], 3), "p.pkl", ".jsonl", ".parquet")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_directory_is_a_data_set_whose_train_split_is_taken(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split, offset in (("test", 10), ("train", 0)):
        rows = [{"text": f"t{offset + i}"} for i in range(3)]
        path = folder / f"{split}.{kind}"
        write_lines(path, *rows) if kind == "jsonl" else write_table(path, rows)
    assert texts(folder) == ["t0", "t1", "t2"]


def test_a_directory_without_a_train_split_gives_what_it_has(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", *ROWS)
    assert texts(tmp_path) == ["a", "b, c", "é"]


@pytest.mark.parametrize("splits", [False, True], ids=["one-set", "splits"])
def test_a_directory_of_save_to_disk_is_read(splits: bool, tmp_path: Path) -> None:
    import datasets

    train = datasets.Dataset.from_list(ROWS)
    saved = datasets.DatasetDict(test=datasets.Dataset.from_list([{"text": "no"}]), train=train) if splits else train
    saved.save_to_disk(str(tmp_path / "set"))
    assert texts(tmp_path / "set") == [row["text"] for row in ROWS]


def test_a_directory_of_save_to_disk_without_its_data_is_a_sentence(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "set"))
    for path in (tmp_path / "set").glob("*.arrow"):
        path.unlink()
    refusal(lambda: load_prompts([str(tmp_path / "set")], 3), "set")


@pytest.mark.parametrize("name", ["json", "csv", "text", "parquet", "set"])
def test_a_directory_is_found_by_a_relative_name_of_any_sort(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    write_lines(tmp_path / name / "train.jsonl", *ROWS)
    monkeypatch.chdir(tmp_path)
    assert texts(name) == ["a", "b, c", "é"]


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    refusal(lambda: load_prompts([str(tmp_path / "set")], 3), "set")


def test_a_script_of_a_data_set_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", *ROWS)
    (folder / "set.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    try:
        assert texts(folder) == ["a", "b, c", "é"]
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


# The hub cache.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if name in vars(constants):
            monkeypatch.setattr(constants, name, str(cache))
    return cache


def cache_data_set(hub: Path, name: str, revision: str = "0" * 40, *, refs: bool = True) -> Path:
    """Put a data set into a cache as the hub's own client would; return its snapshot."""
    repository = hub / f"datasets--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / revision, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_lines(blobs / "abc", *ROWS)
    (snapshot / "data.jsonl").symlink_to(os.path.relpath(blobs / "abc", snapshot))
    if refs:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
    return snapshot


def test_a_data_set_in_the_hub_cache_is_read_without_the_network(hub: Path) -> None:
    cache_data_set(hub, "someone/prompts")
    found = load_prompts(["someone/prompts"], 2)
    assert [prompt.content for prompt in found] == ["a", "b, c"]
    assert all("prompts" in prompt.name for prompt in found)


def test_a_data_set_in_the_hub_cache_is_not_written_to(hub: Path) -> None:
    cache_data_set(hub, "someone/prompts")
    before = sorted(hub.rglob("*"))
    load_prompts(["someone/prompts"], 5)
    assert [path for path in sorted(hub.rglob("*")) if path.name not in ("CACHEDIR.TAG",)] == before


@pytest.mark.parametrize(
    "name", ["someone/absent", "absent", "a/b/c", "../escape", "a b", "-x/y", "no:where/x", "/no/such"]
)
def test_a_name_that_is_not_cached_is_refused_with_what_to_do(name: str, hub: Path) -> None:
    cache_data_set(hub, "someone/prompts")
    remedy = "does not exist" if name.startswith(("/", ".")) else "hf download"
    refusal(lambda: load_prompts([name], 3), name, remedy)


def test_a_cached_data_set_without_a_main_revision_is_refused(hub: Path) -> None:
    cache_data_set(hub, "someone/prompts", refs=False)
    refusal(lambda: load_prompts(["someone/prompts"], 3), "someone/prompts")


# Tokens.


def test_text_becomes_tokens_and_is_cut(tokenizer: Any) -> None:
    ids = tokenizer("The sky is blue today.")["input_ids"]
    prompts = [Prompt("a", "The sky is blue today."), Prompt("b", "The")]
    assert ids_of(prompts, tokenizer, 1000)[0] == ids
    assert ids_of(prompts, tokenizer, 3)[0] == ids[:3]
    assert [len(row) for row in ids_of(prompts, tokenizer, 1)] == [1, 1]
    assert all(type(token) is int for row in ids_of(prompts, tokenizer, 5) for token in row)


def test_text_without_tokens_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ '' }}"
    refusal(lambda: tokenize([Prompt("line 3", [USER])], tokenizer, 10), "line 3", "no tokens")


def test_half_a_character_is_a_sentence_or_has_tokens(tokenizer: Any) -> None:
    """JSON can name a lone surrogate, as in text that was cut between the two halves of an emoji."""
    prompts = [Prompt("line 3", parse_row(json.loads('{"text": "so \\ud83d"}'), "line 3").content)]
    try:
        assert ids_of(prompts, tokenizer, 10)[0]
    except InputError as error:
        assert "line 3" in str(error)


def test_without_a_template_the_contents_of_a_conversation_follow_each_other(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    ids = ids_of([Prompt("a", [SYSTEM, USER, ASSISTANT])], tokenizer, 100)[0]
    assert ids == tokenizer("Be brief.\n\nWhy is the sky blue?\n\nScattering.")["input_ids"]


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def rendered(tokenizer: Any, *messages: dict[str, str]) -> str:
    return str(tokenizer.decode(ids_of([Prompt("line 3", list(messages))], tokenizer, 1000)[0]))


def test_a_conversation_goes_through_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    text = rendered(tokenizer, SYSTEM, USER)
    assert text == "<system>Be brief.\n<user>Why is the sky blue?\n<assistant>"
    assert rendered(tokenizer, USER, ASSISTANT) == "<user>Why is the sky blue?\n<assistant>Scattering.\n"


def test_a_template_without_system_role_gets_it_before_the_first_question(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_SYSTEM + TEMPLATE
    text = rendered(tokenizer, SYSTEM, USER, ASSISTANT)
    assert text == "<user>Be brief.\n\nWhy is the sky blue?\n<assistant>Scattering.\n"


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
AGENT = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL], "function_call": None},
    {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "Rain."},
]
TOOLS_TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content if m.content is not none else '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}:{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER])], ids=["list", "json"])
def test_calls_of_tools_reach_the_template(tools: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = TOOLS_TEMPLATE
    prompt = parse_row({"messages": AGENT, "tools": tools}, "line 3")
    text = tokenizer.decode(ids_of([prompt], tokenizer, 1000)[0])
    assert text == '[weather]<user>Why is the sky blue?<assistant>weather:{"city": "Oslo"}<tool>Rain.'


def test_tools_that_are_no_json_are_a_sentence() -> None:
    refusal(lambda: parse_row({"messages": [USER], "tools": "[{"}, "line 3"), "line 3", "tools")


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,  # writes None as a word
        TEMPLATE.replace("m['content']", "m['content'] | trim"),  # as a word, too
        TEMPLATE.replace("m['content']", "m['content'] + ''"),  # raises
    ],
    ids=["writes", "trims", "adds"],
)
def test_content_of_null_is_no_word_of_the_prompt(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    text = tokenizer.decode(ids_of([parse_row({"messages": AGENT}, "line 3")], tokenizer, 1000)[0])
    assert "None" not in text
    assert "Rain." in text


def test_a_template_that_reads_parts_only_gets_parts(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    rows = [{"messages": [USER]}, {"messages": [{"role": "user", "content": PARTS}]}]
    found = ids_of([parse_row(row, "line 3") for row in rows], tokenizer, 1000)
    assert [tokenizer.decode(ids) for ids in found] == ["<user>Why is the sky blue?", "<user>What is\nthis?"]


def test_without_a_template_calls_are_json(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    text = tokenizer.decode(ids_of([parse_row({"messages": AGENT}, "line 3")], tokenizer, 1000)[0])
    assert '"name": "weather", "arguments": {"city": "Oslo"}' in text
    assert "None" not in text


@pytest.mark.parametrize("messages", [[SYSTEM], [SYSTEM, SYSTEM, USER]])
def test_a_system_role_that_nothing_follows_is_a_sentence(messages: list[dict[str, str]], tokenizer: Any) -> None:
    tokenizer.chat_template = NO_SYSTEM + TEMPLATE
    try:
        assert rendered(tokenizer, *messages)
    except InputError as error:
        assert "System role not supported" in str(error)


HOSTILE: dict[str, str] = {
    "attributes": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch ' ~ messages[0].content) }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "changes-messages": "{{ messages.append(1) }}",
    "self": "{{ self.__init__.__globals__ }}",
    "undefined": "{{ messages[9].content }}",
    "raises": "{{ raise_exception('no') }}",
    "raises-lines": "{{ raise_exception('no\nfp8pack: all is well\n' * 500) }}",
    "syntax": "{% if %}",
    "unknown-tag": "{% evil %}",
    "includes-a-file": "{% include '/etc/hostname' %}",
    "imports": "{% import 'os' as os %}{{ os }}",
    "divides-by-zero": "{{ 1 / 0 }}",
    "adds-text-to-a-number": "{{ 1 + 'a' }}",
    "too-long-a-range": "{% for i in range(1000000) %}x{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "wrong-type": "{{ strftime_now(5) }}",
    "wrong-arguments": "{{ raise_exception() }}",
    "no-such-filter": "{{ messages | evil }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_runs_no_code_and_ends_in_a_sentence(name: str, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = HOSTILE[name]
    proof = tmp_path / "ran"
    messages = [{"role": "user", "content": str(proof)}]
    refusal(lambda: tokenize([Prompt("line 3", messages)], tokenizer, 100), "line 3")
    assert not proof.exists()


def test_several_templates_without_a_default_are_a_sentence(tokenizer: Any) -> None:
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    refusal(lambda: tokenize([Prompt("line 3", [USER])], tokenizer, 100), "template")


def test_several_templates_with_a_default_take_it(tokenizer: Any) -> None:
    tokenizer.chat_template = {"tool_use": "x", "default": "default"}
    assert rendered(tokenizer, USER) == "default"
