"""Forty calls as a user of transformers would type them, without reading: they type-check, and each does what it says.

`RIGHT` are run in order in an empty directory that holds `model`, a BF16 checkpoint. `WRONG` are refused with a
sentence. tests/api/test_user_code.py runs both, and holds mypy --strict against this file.
"""

from collections.abc import Callable
from pathlib import Path

import fp8pack


def packs_with_the_defaults() -> None:
    result = fp8pack.pack("model")
    assert result.output.name == "model-FP8-block"
    assert result.scheme is not None and result.scheme.name == "FP8_BLOCK"
    assert result.num_packed == 14 and not result.dry_run


def packs_to_a_path() -> None:
    assert fp8pack.pack(Path("model"), "packed", scheme="fp8-dynamic").output == Path("packed").absolute()


def packs_again_and_finds_it_complete() -> None:
    assert fp8pack.pack("model", "packed", scheme="FP8_DYNAMIC").already_complete


def packs_with_everything_as_text() -> None:
    result = fp8pack.pack(
        "model",
        "custom",
        format="E4M3",
        granularity="block:128x128",
        quant_method="compressed_tensors",
        scale_rounding="up",
        activations="dynamic",
        ignore="*.o_proj",
        targets="vLLM,sglang",
        tp=1,
        gpu="H100",
        max_memory="1GiB",
        max_shard_size="5GB",
        workers=2,
        deadline="50m",
    )
    assert result.num_packed == 12
    assert result.targets == ("vllm", "sglang")


def packs_a_list_of_patterns() -> None:
    assert (
        fp8pack.pack("model", "lists", ignore=["*.o_proj", "re:.*down_proj"], only=["model.layers.*"]).num_packed == 10
    )


def packs_first_and_last_layers_in_bf16() -> None:
    assert fp8pack.pack("model", "edges", keep_first_layers=1).num_packed == 7


def plans_without_writing() -> None:
    plan = fp8pack.pack("model", "never", dry_run=True)
    assert plan.dry_run and plan.root is None and not Path("never").exists()
    assert [tensor.name for tensor in plan.tensors if tensor.action == "packed"]


def packs_by_a_recipe() -> None:
    Path("recipe.yaml").write_text("scheme: MXFP8\nignore: ['*.o_proj']\ntarget: vllm\n", encoding="utf-8")
    result = fp8pack.pack("model", "by-recipe", recipe="recipe.yaml")
    assert result.scheme is not None and result.scheme.name == "MXFP8"


def packs_as_an_earlier_output_was() -> None:
    result = fp8pack.pack("model", "as-before", recipe="by-recipe/fp8pack.json", targets="vllm")
    assert result.scheme is not None and result.scheme.name == "MXFP8" and result.num_packed == 12


def packs_by_a_mapping() -> None:
    assert fp8pack.pack("model", "by-mapping", recipe={"scheme": "FP8_DYNAMIC"}).num_packed == 14


def reports_progress() -> None:
    seen: list[tuple[int, int]] = []
    fp8pack.pack("model", "watched", on_progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1]


def replaces_an_output() -> None:
    assert not fp8pack.pack("model", "watched", scheme="W8A16", overwrite=True).already_complete


def writes_its_result_as_json() -> None:
    document = fp8pack.pack("model", dry_run=True, output="never").to_dict()
    assert document["schema"] == 1 and document["num_packed"] == 14


def shows_itself_in_a_notebook() -> None:
    assert "<table>" in fp8pack.pack("model", "never", dry_run=True)._repr_html_()
    assert "<table>" in fp8pack.inspect("packed")._repr_html_()


def inspects() -> None:
    found = fp8pack.inspect("packed")
    weight = found["model.layers.0.mlp.down_proj.weight"]
    assert weight.format == "e4m3" and weight.granularity == "channel"
    assert found.totals.num_packed == 14 and found.root is not None


def measures_against_the_source() -> None:
    assert (fp8pack.inspect("packed", "model", fail_if="sqnr_min<20").totals.sqnr_min or 0) > 25


def asks_an_engine() -> None:
    verdicts = fp8pack.inspect("packed", targets="vllm", tp=2).engines
    assert [verdict.engine for verdict in verdicts] == ["vllm"] and 2 in verdicts[0].tp


def compares() -> None:
    found = fp8pack.diff("packed", "model-FP8-block")
    assert found.totals.num_tensors > found.totals.num_equal


def converts() -> None:
    result = fp8pack.convert("packed", "converted", quant_method="fp8pack")
    assert result.num_carried == 14


def unpacks() -> None:
    assert fp8pack.unpack("packed", "unpacked", dtype="float32").num_unpacked == 14


def loads() -> None:
    packed = fp8pack.load_packed("packed")
    weight = packed["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(weight, fp8pack.PackedTensor)
    assert weight.granularity == "channel"


RIGHT: tuple[Callable[[], None], ...] = (
    packs_with_the_defaults,
    packs_to_a_path,
    packs_again_and_finds_it_complete,
    packs_with_everything_as_text,
    packs_a_list_of_patterns,
    packs_first_and_last_layers_in_bf16,
    plans_without_writing,
    packs_by_a_recipe,
    packs_as_an_earlier_output_was,
    packs_by_a_mapping,
    reports_progress,
    replaces_an_output,
    writes_its_result_as_json,
    shows_itself_in_a_notebook,
    inspects,
    measures_against_the_source,
    asks_an_engine,
    compares,
    converts,
    unpacks,
    loads,
)

# Each call is refused with this in its sentence.
WRONG: tuple[tuple[Callable[[], object], str], ...] = (
    (lambda: fp8pack.pack("no-such-model"), "no-such-model"),
    (lambda: fp8pack.pack("model", "x", scheme="FP8_BLOK"), "did you mean 'FP8_BLOCK'"),
    (lambda: fp8pack.pack("model", "x", granularity="blocks"), "granularity 'blocks' is not known"),
    (lambda: fp8pack.pack("model", "x", quant_method="gptq"), "quant method 'gptq' is not known"),
    (lambda: fp8pack.pack("model", "x", tp=-2), "tp -2 is not a whole number from 1"),
    (lambda: fp8pack.pack("model", "x", workers=-3), "workers -3 is not a whole number"),
    (lambda: fp8pack.pack("model", "x", max_memory="-1GB"), "max memory '-1GB' is not a size"),
    (lambda: fp8pack.pack("model", "x", max_shard_size=0), "max shard size 0 is not a size"),
    (lambda: fp8pack.pack("model", "x", deadline="soon"), "deadline 'soon' is not a duration"),
    (lambda: fp8pack.pack("model", "x", targets="vllm,llama.cpp"), "target 'llama.cpp' is not known"),
    (lambda: fp8pack.pack("model", "x", gpu="h1000"), "did you mean 'h100'"),
    (lambda: fp8pack.pack("model", "x", ignore="*.qkv"), "'*.qkv' matches no tensor"),
    (lambda: fp8pack.pack("model", "x", ignore="re:("), "not a valid regular expression"),
    (lambda: fp8pack.pack("model", "x", recipe={"ignroe": "x"}), "did you mean 'ignore'"),
    (lambda: fp8pack.pack("model", "x", recipe="no-such-recipe.yaml"), "no-such-recipe.yaml"),
    (lambda: fp8pack.pack("model", "x", device="tpu", dry_run=True), "tpu"),
    (lambda: fp8pack.pack("model", "packed", scheme="MXFP8", dry_run=True), "exists"),
    (lambda: fp8pack.unpack("packed", "x", dtype="int8"), "dtype 'int8' is not known"),
    (lambda: fp8pack.convert("model", "x", scheme="FP8_DYNAMIC"), "no FP8 weight"),
    (lambda: fp8pack.inspect("packed", fail_if="sqnr<3"), "'sqnr<3' is not a bound"),
    (lambda: fp8pack.inspect("packed", "model", fail_if="sqnr_min<99"), "sqnr_min is"),
    (lambda: fp8pack.calibrate("model", prompts="no-such-file.jsonl"), "no-such-file.jsonl"),
    (lambda: fp8pack.merge(["no-such-calibration.safetensors"], "merged.safetensors"), "no-such-calibration"),
)
