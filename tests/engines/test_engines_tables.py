"""The tables of rules, the page that is made from them, and scales as readers want them on disk."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from engines.engine_cases import READ_BY, UP, storage

from fp8pack.engines.engine import Engine, EngineRule, Evidence
from fp8pack.engines.gpus import GPUS
from fp8pack.engines.ignore_list import Match, is_understood
from fp8pack.engines.known import ENGINES
from fp8pack.engines.scale_layouts import SCALES, scale_problem
from fp8pack.modelfacts.spec import Stored
from fp8pack.numerics.granularity import CHANNEL

ROOT = Path(__file__).parents[2]


# Scales on disk.

UP_WEIGHT = f"{UP}.weight"


@pytest.mark.parametrize(
    ("kind", "suffix", "dtype", "shape"),
    [
        ("fp8 block:128x128 dynamic", "_scale_inv", "F32", (2, 3)),
        ("fp8 block:128x128 dynamic", "_scale_inv", "BF16", (2, 3)),
        ("fp8 tensor static", "_scale", "F32", ()),
        ("fp8/transformers tensor static", "_scale_inv", "F32", ()),
        ("compressed-tensors channel dynamic", "_scale", "F32", (256, 1)),
        ("compressed-tensors tensor static", "_scale", "BF16", (1,)),
        ("compressed-tensors mx dynamic", "_scale", "U8", (256, 12)),
        ("modelopt tensor static", "_scale", "F32", ()),
        ("modelopt tensor static", "_scale", "F32", (1,)),
        ("modelopt mx dynamic", "_scale", "U8", (256, 12)),
        ("modelopt channel dynamic", "_scale", "F32", (256,)),
        ("modelopt block:128x128 dynamic", "_scale", "F32", (2, 1, 3, 1)),
        ("mxfp8 mx dynamic", "_scale_inv", "U8", (256, 12)),
        ("quark tensor static", "_scale", "F32", ()),
        ("quark mx dynamic", "_scale", "U8", (256, 12)),
        ("quark channel dynamic", "_scale", "F32", (256,)),
        ("quark block:128x128 dynamic", "_scale", "F8_E8M0", (2, 3)),
        ("fbgemm_fp8 channel dynamic", "_scale", "F32", (256, 1)),
        ("comfyui tensor dynamic", "_scale", "F32", ()),
    ],
)
def test_scales_have_the_name_dtype_and_shape_that_readers_want(
    kind: str, suffix: str, dtype: str, shape: tuple[int, ...]
) -> None:
    stored, weight_shape = storage(kind), (256, 384)
    good = Stored(UP_WEIGHT + suffix, dtype, shape)
    assert scale_problem(stored, UP_WEIGHT, weight_shape, good) is None
    wrong = [
        (replace(good, name=f"{UP}.scale"), "is not called"),
        (replace(good, dtype="F64"), "is F64, not"),
        (replace(good, shape=(1, 1)), r"is \[1, 1\], not"),
    ]
    for scale, words in wrong:
        problem = scale_problem(stored, UP_WEIGHT, weight_shape, scale)
        assert problem is not None
        assert words.replace("\\", "") in problem


def test_scales_of_other_conventions_are_not_judged() -> None:
    assert scale_problem(storage("fp8pack group:64 dynamic"), "w", (64, 64), Stored("s", "F32", (64, 1))) is None


# The tables, and the page that is made from them.


def rules_of(engine: Engine) -> tuple[EngineRule, ...]:
    about_weights = (*engine.weights, *engine.experts, *engine.wrappers)
    return (*engine.readers, *about_weights, *engine.on_gpu, *engine.kv_cache)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.id)
def test_every_rule_says_where_it_was_read_and_why(engine: Engine) -> None:
    for rule in rules_of(engine):
        assert rule.source
        assert rule.loads or rule.text
        assert not rule.loads or not rule.remedy
    assert all(row.source for row in engine.lists)
    assert engine.partial_blocks is None or engine.partial_blocks.source
    assert engine.version.startswith(engine.name.split()[-1])


def test_engines_are_known_by_their_own_ids_and_names() -> None:
    assert len({engine.id for engine in ENGINES}) == len({engine.name for engine in ENGINES}) == len(ENGINES)
    assert all(row.source for row in SCALES)


def test_only_what_tests_of_libraries_ran_counts_as_run() -> None:
    run = {
        (engine.id, kind)
        for engine in ENGINES
        for rule in engine.readers
        if rule.evidence == Evidence.RUN
        for kind in rule.kinds.split(", ")
    }
    kinds = (
        "channel dynamic",
        "channel none",
        "mx dynamic",
        "block:128x128 dynamic",
        "tensor dynamic",
        "tensor static",
    )
    expected = {("transformers", f"compressed-tensors {kind}") for kind in kinds}
    others = ("fp8 block:128x128 dynamic", "fp8/transformers tensor dynamic", "mxfp8 mx dynamic", "torchao *")
    assert run == expected | {("transformers", kind) for kind in others}
    refused = [
        engine.id
        for engine in ENGINES
        for rule in (*engine.weights, *engine.experts, *engine.wrappers, *engine.on_gpu, *engine.kv_cache)
        if rule.evidence == Evidence.RUN
    ]
    assert refused == ["transformers"] * 3  # tests/interop/test_methods.py


def test_every_rule_of_a_gpu_names_one_that_is_known() -> None:
    known = {gpu.arch for gpu in GPUS.values()} | {"any"}
    for rule in (rule for engine in ENGINES for rule in engine.on_gpu):
        for arch in rule.only:
            assert arch in known or any(candidate.startswith(arch.rstrip("*")) for candidate in known), arch


def test_entries_are_names_globs_or_expressions() -> None:
    assert is_understood("a.b", ())
    assert not is_understood("a.*", (Match.WHOLE, Match.REGEX))
    assert is_understood("a.*", (Match.GLOB_OF_PART,))
    assert not is_understood("re:a", (Match.GLOB,))
    assert is_understood("re:a", (Match.REGEX,))


def test_the_page_of_engines_is_the_one_that_the_rules_make() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "engines.md").read_text(encoding="utf-8") == generate["engines_text"]()


def test_the_page_of_engines_shows_every_kind_of_storage() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    assert {f"| `{kind}` |" in page for kind in generate["KINDS"]} == {True}
    assert {kind.split()[0] for kind in READ_BY} <= {kind.split()[0] for kind in generate["KINDS"]}
    assert CHANNEL.name in page
