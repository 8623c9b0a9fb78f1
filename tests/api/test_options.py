"""Every option of a command is a keyword of the function of the same name, with the same default."""

import inspect as introspection
from typing import Any

import pytest

import fp8pack
from fp8pack.calibration.options import CalibrateOptions
from fp8pack.cli import calibrate, convert, diff, inspect, merge, pack, recommend, unpack
from fp8pack.cli import eval as evaluation
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request

COMMANDS = {
    "pack": pack.pack,
    "convert": convert.convert,
    "unpack": unpack.unpack,
    "inspect": inspect.inspect,
    "diff": diff.diff,
    "calibrate": calibrate.calibrate,
    "merge": merge.merge,
    "evaluate": evaluation.evaluate,
    "recommend": recommend.recommend,
}
PRINTING = {"ctx", "as_json", "as_markdown", "html", "quiet", "verbose"}  # of the command line alone
CHOOSING = {  # which tensors are printed, and which function is called
    "inspect": {"tensor", "tensors", "only", "where", "sort", "explain"},
    "evaluate": {"per_layer", "per_linear", "output"},
    "pack": {"evaluate"},  # in Python: card_section
}
LISTENING = {"on_progress", "on_note", "card_section"}  # of Python alone
INNER = {"rules", "sizes"}  # of recipe files, and of tests


def keywords(function: Any) -> dict[str, Any]:
    return {name: given.default for name, given in introspection.signature(function).parameters.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_keywords_of_the_same_names(name: str) -> None:
    typed, called = set(keywords(COMMANDS[name])), set(keywords(getattr(fp8pack, name)))
    assert typed - PRINTING - CHOOSING.get(name, set()) == called - LISTENING


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_the_same(name: str) -> None:
    typed, called = keywords(COMMANDS[name]), keywords(getattr(fp8pack, name))
    for option in typed.keys() & called.keys():
        if typed[option] is introspection.Parameter.empty:
            assert called[option] is introspection.Parameter.empty
            continue
        ours, theirs = typed[option] or None, called[option] or None
        known = {"max_memory": "256MiB", "prompts": None, "text": "held-out"}
        assert str(ours or known.get(option)) == str(theirs or known.get(option)) or option == "prompts", option


@pytest.mark.parametrize(("kind", "function"), [(Request, fp8pack.pack), (WriteOptions, fp8pack.pack)])
def test_what_is_stored_are_keywords_too(kind: Any, function: Any) -> None:
    assert set(keywords(kind)) - INNER <= set(keywords(function))


def test_options_of_calibrate_are_those_that_are_stored() -> None:
    assert set(keywords(CalibrateOptions)) == set(keywords(fp8pack.calibrate)) - {"model"} - LISTENING


def test_values_that_are_stored_are_taken_as_they_are() -> None:
    request = Request(granularity="block:128x128", ignore="a*", targets="vLLM", gpu="H100 SXM", tp="2", percentile="99")
    assert Request(**{name: getattr(request, name) for name in keywords(Request)}) == request
    options = WriteOptions(max_memory="1GiB", max_shard_size="5GB", deadline="1.5h", copy="*.gguf", workers="3")
    assert WriteOptions(**{name: getattr(options, name) for name in keywords(WriteOptions)}) == options
    assert (options.max_memory, options.max_shard_size, options.deadline) == (1 << 30, 5 * 10**9, 5400.0)


@pytest.mark.parametrize(
    ("sentence", "hint", "in_python", "typed"),
    [
        (
            "x exists",
            "choose another -o, or --overwrite replaces it",
            "choose another output, or overwrite=True replaces it",
            ": ",
        ),
        ("a is FP8", "--ignore a.b", "ignore='a.b'", ": "),
        ("it is unknown: did you mean 'y'?", "choose y or z", "choose y or z", " "),
        ("unfinished work", "--no-resume discards it", "resume=False discards it", ": "),
        ("b", "--kv-cache, or --scheme FP8_DYNAMIC --tp 4", "kv_cache=True, or scheme='FP8_DYNAMIC' tp=4", ": "),
    ],
)
def test_a_hint_speaks_python_to_python_and_options_to_the_shell(
    sentence: str, hint: str, in_python: str, typed: str
) -> None:
    error = fp8pack.RecipeError(sentence, hint)
    assert (str(error), error.hint, error.command_line) == (sentence, in_python, f"{sentence}{typed}{hint}")


def test_a_sentence_names_options_as_they_are_called_where_it_is_read() -> None:
    error = fp8pack.RecipeError("--scale-rounding and --no-resume do not go with -o")
    assert str(error) == "scale_rounding and resume=False do not go with output"
    assert error.command_line == "--scale-rounding and --no-resume do not go with -o"
    assert error.hint == ""
