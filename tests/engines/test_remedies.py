"""Every remedy of a verdict is applied as a person would apply it, and then the engine loads the output."""

import shlex
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from checkpoints import MakeCheckpoint, llama_config, llama_tensors, random_weight

import fp8pack
from fp8pack.engines.judge import METHODS, PRESETS
from fp8pack.engines.known import BY_ID, NAMES
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.planning.recipe import SCHEMES, WRITABLE

GRANULARITIES = ("tensor", "channel", "group:64", "block:128x128", "mx")
RECIPES: list[dict[str, Any]] = [
    *({"scheme": scheme.name} for scheme in SCHEMES if scheme.activations != "static"),
    *({"quant_method": method, "granularity": size} for method, size in product(WRITABLE, GRANULARITIES)),
    *({"quant_method": method, "granularity": "channel", "activations": "none"} for method in WRITABLE),
    *({"quant_method": method, "granularity": "tensor", "format": "e5m2"} for method in ("fp8pack", "comfyui")),
]
PARTS = {"scheme", "format", "granularity", "quant_method", "activations", "scale_rounding"}  # of a recipe


def options_of(remedy: str) -> dict[str, str]:
    """The options of the first way out: `--scheme FP8_DYNAMIC, or serve …` as scheme='FP8_DYNAMIC'."""
    words = shlex.split(remedy.split(", or ", maxsplit=1)[0])
    return {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)
    }


def applied(asked: dict[str, Any], remedy: dict[str, str]) -> dict[str, Any]:
    """The options that were typed, with those of the remedy: a scheme replaces every part of a recipe."""
    kept = {name: value for name, value in asked.items() if "scheme" not in remedy or name not in PARTS}
    return {**kept, **remedy}


def dry_run(source: Path, **asked: Any) -> fp8pack.PackResult | None:
    try:
        return fp8pack.pack(source, dry_run=True, **asked)
    except fp8pack.Fp8PackError:
        return None  # a recipe that cannot be stored has no verdict


def test_presets_are_stored_as_the_judge_tries_them() -> None:
    presets = {scheme.name: scheme for scheme in SCHEMES if scheme.activations != "static"}
    assert {
        name: Storage(
            preset.quant_method,
            preset.format,
            preset.granularity,
            preset.activations,
            powers_of_two=preset.scale_rounding != ScaleRounding.NONE,
        )
        for name, preset in presets.items()
    } == PRESETS
    assert {*METHODS, "fp8pack", "comfyui-scaled"} == set(WRITABLE)


@pytest.fixture
def dense(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint()


@pytest.fixture
def ragged(make_checkpoint: MakeCheckpoint) -> Path:
    tensors = llama_tensors() | {"model.layers.0.self_attn.k_proj.weight": random_weight((96, 256))}
    return make_checkpoint(tensors)


@pytest.fixture
def experts(make_checkpoint: MakeCheckpoint) -> Path:
    shapes = {"gate_proj": (192, 256), "up_proj": (192, 256), "down_proj": (256, 192)}
    names = {f"model.layers.0.mlp.experts.{i}.{leaf}.weight": shape for i in range(2) for leaf, shape in shapes.items()}
    tensors = {name: random_weight(shape, i) for i, (name, shape) in enumerate(names.items())}
    return make_checkpoint(llama_tensors() | tensors, config=llama_config("Qwen3MoeForCausalLM"))


@pytest.mark.parametrize("asked", RECIPES, ids=lambda asked: " ".join(map(str, asked.values())))
@pytest.mark.parametrize("model", ["dense", "ragged", "experts"])
def test_an_engine_loads_what_its_remedy_makes(
    model: str, asked: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(model)
    result = dry_run(source, **asked)
    for verdict in result.engines if result else ():
        if verdict.loads is not False or not verdict.remedy.startswith("--"):
            continue
        if BY_ID[verdict.engine].is_for_language_models:
            better = fp8pack.pack(source, dry_run=True, **applied(asked, options_of(verdict.remedy)))
            assert any(other.loads is not False for other in better.engines if other.engine == verdict.engine), (
                f"{NAMES[verdict.engine]}: {verdict.reason} ({verdict.remedy})"
            )
