"""What is not converted, and what the message says of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import verbs
from checkpoints import random_weight, write_model
from packing.fp8_sources import LAYER, asked, config_of, convert, float_weights, others, source_of
from typer.testing import CliRunner

import fp8pack
from fp8pack.checkpoint.quant_methods import METHODS
from fp8pack.cli.app import app
from fp8pack.errors import InputError, RecipeError
from fp8pack.numerics.formats import parse_format
from fp8pack.packing.options import WriteOptions


@pytest.mark.parametrize(
    ("granularity", "activations", "request_", "able"),
    [
        (
            "block:128x128",
            "dynamic",
            {"method": "mxfp8"},
            ["fp8", "compressed-tensors", "modelopt", "quark", "fp8pack"],
        ),
        ("channel", "dynamic", {"method": "fp8"}, ["compressed-tensors", "modelopt", "quark", "fp8pack"]),
        ("tensor", "static", {"method": "mxfp8"}, ["fp8", "compressed-tensors", "modelopt", "quark", "comfyui"]),
        ("tensor", "dynamic", {"method": "modelopt"}, ["fp8", "compressed-tensors", "quark", "comfyui", "fp8pack"]),
        ("tensor", "dynamic", {"granularity": "group:48", "method": "quark"}, ["compressed-tensors", "fp8pack"]),
        ("channel", "dynamic", {"method": "comfyui", "format": parse_format("e5m2")}, ["fp8pack"]),
    ],
    ids=str,
)
def test_what_a_convention_cannot_hold_is_refused_with_those_that_can(
    granularity: str, activations: str, request_: dict[str, Any], able: list[str], tmp_path: Path
) -> None:
    source = source_of(tmp_path / "source", granularity, activations)
    with pytest.raises(RecipeError) as caught:
        verbs.convert(source, asked(**request_), WriteOptions(tmp_path / "out"))
    message = caught.value.command_line
    assert len(message.splitlines()) == 1
    offered = message.partition("--quant-method ")[2].split(" or ")
    assert set(able) <= set(offered), message
    assert request_["method"] not in offered
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_conversion_to_nothing_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel")
    with pytest.raises(RecipeError, match="nothing to convert to"):
        fp8pack.convert(source, tmp_path / "out")


def test_a_convention_that_is_not_known_is_refused_with_all_that_are(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel")
    with pytest.raises(RecipeError) as caught:
        verbs.convert(source, asked(method="awq"), WriteOptions(tmp_path / "out"))
    assert all(method.name in caught.value.hint for method in METHODS)


def test_floats_alone_are_refused_with_the_way_out(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", float_weights() | others(), config_of())
    with pytest.raises(InputError, match="has no FP8 weight") as caught:
        verbs.convert(source, asked(method="fp8", granularity="block:128x128"), WriteOptions(tmp_path / "out"))
    assert caught.value.command_hint == "`fp8pack pack` makes an FP8 checkpoint of it"


def test_the_commands_print_the_output_alone_and_an_error_is_one_line(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel")
    for command, flags in (("convert", ["--quant-method", "compressed_tensors"]), ("unpack", ["--dtype", "float16"])):
        ran = CliRunner().invoke(app, [command, str(source), "-o", str(tmp_path / command), "-q", *flags])
        assert ran.exit_code == 0, ran.output
        assert ran.stdout == f"{tmp_path / command}\n"
        ran = CliRunner().invoke(app, [command, str(source), "-o", str(tmp_path / command), "-q", *flags, "--json"])
        assert json.loads(ran.stdout)["already_complete"]
        fp8pack.inspect(tmp_path / command)
    ran = CliRunner().invoke(app, ["convert", str(source), "--quant-method", "mxfp8"])
    assert isinstance(ran.exception, RecipeError)
    assert ran.stdout == ""


@pytest.mark.parametrize("name", ["comfyui", "comfyui-scaled", "torchao"])
def test_a_name_that_is_taken_already_is_refused(name: str, tmp_path: Path) -> None:
    """A tensor of the source would be written twice under one name."""
    leaf = {"comfyui": "comfy_quantity", "comfyui-scaled": "scale_weights", "torchao": "_weight_scales"}[name]
    extra = {f"{LAYER}.mlp.up_proj.{leaf}": random_weight((4,))}
    source = source_of(tmp_path / "source", "tensor", extra=extra)
    found = convert(source, tmp_path / "out", asked(method=name))
    assert f"{LAYER}.mlp.up_proj.{leaf}" in found
    taken = {"comfyui": "weight_scale", "comfyui-scaled": "scale_weight", "torchao": "_weight_scale"}[name]
    extra = {f"{LAYER}.mlp.up_proj.{taken}": random_weight((4, 4))}
    source = source_of(tmp_path / "other", "tensor", extra=extra)
    with pytest.raises(InputError) as caught:
        verbs.convert(source, asked(method=name), WriteOptions(tmp_path / "no"))
    assert taken in str(caught.value)
