"""What verdicts say of model classes, by the data files; and that the program that writes those reads code right."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from engines.engine_cases import BLOCK, DYNAMIC, LAYER, QWEN, dense, judge, weight

import fp8pack
from fp8pack.engines.case import make_case
from fp8pack.engines.class_facts import EngineFacts, read_class_facts
from fp8pack.engines.judge import judge_engines
from fp8pack.engines.known import BY_ID, ENGINES, parse_targets
from fp8pack.errors import BoundError, RecipeError
from fp8pack.modelfacts.storage import Storage

ROOT = Path(__file__).parents[2]
DATA = ROOT / "fp8pack" / "engines" / "data"
FILES = sorted(DATA.glob("*.json"))


# Verdicts.


@pytest.mark.parametrize(
    ("engine", "architecture", "loads", "reason"),
    [
        ("vllm", "Qwen2ForCausalLM", True, ""),
        ("vllm", "XForCausalLM", None, "XForCausalLM is not among its 403 classes"),
        ("vllm", "MllamaForConditionalGeneration", False, "it had MllamaForConditionalGeneration until 0.10.2"),
        ("sglang", "XForCausalLM", None, "is not among its 290 classes"),
        ("transformers", "XForCausalLM", None, "is not among its"),
        ("lmdeploy", "BertForMaskedLM", False, "is not among its 70 classes"),
        ("tensorrt-llm", "BertForMaskedLM", False, "is not among its 81 classes"),
        ("cublaslt", "XForCausalLM", True, ""),
    ],
)
def test_an_engine_is_held_to_the_classes_that_it_has(
    engine: str, architecture: str, loads: bool | None, reason: str
) -> None:
    verdict = judge(BLOCK, engine, facts=replace(QWEN, architecture=architecture, model_type="x"))
    assert verdict.loads is loads
    assert bool(verdict.tp) is (loads is True)
    assert reason in verdict.reason


def test_tgi_goes_by_the_model_type() -> None:
    assert judge(BLOCK, "tgi", facts=replace(QWEN, model_type="llama")).loads
    assert judge(BLOCK, "tgi", facts=replace(QWEN, model_type="qwen3")).loads is None


def test_what_an_engine_refuses_of_any_class_is_no_although_the_class_is_not_known() -> None:
    assert judge("modelopt channel dynamic", "sglang", facts=replace(QWEN, architecture="X")).loads is False


@pytest.mark.parametrize(
    ("architecture", "engine", "module", "reason"),
    [
        ("JambaForCausalLM", "vllm", f"{LAYER}.mamba.in_proj", "its class builds in_proj in BF16"),
        ("JambaForCausalLM", "vllm", f"{LAYER}.mamba.out_proj", "its class builds out_proj in BF16"),
        ("FalconMambaForCausalLM", "vllm", f"{LAYER}.mixer.in_proj", "its class builds in_proj in BF16"),
        (
            "DeepseekV32ForCausalLM",
            "vllm",
            f"{LAYER}.self_attn.indexer.weights_proj",
            "its class builds wk_weights_proj in BF16",
        ),
        (
            "DeepseekV32ForCausalLM",
            "sglang",
            f"{LAYER}.self_attn.indexer.weights_proj",
            "its class builds weights_proj in BF16",
        ),
    ],
)
def test_a_linear_that_a_class_builds_in_bf16_is_no_place_for_fp8(
    architecture: str, engine: str, module: str, reason: str
) -> None:
    packed = [*dense(), weight(module, 256, 256, "ssm")]
    verdict = judge(DYNAMIC, engine, packed, replace(QWEN, architecture=architecture))
    assert verdict.loads is False
    assert verdict.reason == f"{module} is FP8, and {reason}"
    assert verdict.remedy == f"--ignore '*.{module.rpartition('.')[2]}'"
    assert judge(DYNAMIC, engine, facts=replace(QWEN, architecture=architecture)).loads


def test_the_indexer_of_deepseek_is_dequantized_from_block_scales() -> None:
    packed = [*dense(), weight(f"{LAYER}.self_attn.indexer.wk", 128, 256, "attn.k")]
    facts = replace(QWEN, architecture="DeepseekV32ForCausalLM")
    assert judge(BLOCK, "vllm", packed, facts).loads
    assert judge(DYNAMIC, "vllm", packed, facts).loads is False


def test_a_linear_that_parsing_leaves_open_makes_the_verdict_unknown() -> None:
    facts = replace(QWEN, architecture="MiMoV2ForCausalLM")
    assert judge(DYNAMIC, "vllm", [weight(f"{LAYER}.self_attn.o_proj", 256, 256)], facts).loads is None


def test_an_engine_that_may_load_it_is_no_failure_of_pack_and_one_of_inspect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from checkpoints import llama_config, llama_tensors, write_model

    source = write_model(tmp_path / "model", llama_tensors(), llama_config("XForCausalLM"))
    result = fp8pack.pack(source, tmp_path / "out", targets="vllm")
    assert {verdict.engine: verdict.loads for verdict in result.engines}["vllm"] is None
    assert {verdict["engine"]: verdict["loads"] for verdict in result.to_dict()["engines"]}["vllm"] is None
    from fp8pack.cli.app import app

    with pytest.raises(BoundError, match="vLLM may not load this checkpoint: XForCausalLM"):
        app(["inspect", str(tmp_path / "out"), "--target", "vllm"], standalone_mode=False)
    assert "not known: vLLM" in capsys.readouterr().out


# Data files.


def test_every_data_file_is_of_an_engine_and_small() -> None:
    facts_and_modules = {name for engine in ENGINES for name in (engine.facts, engine.modules) if name}
    assert facts_and_modules <= {path.stem for path in FILES}
    for path in FILES:
        assert path.stat().st_size < 300_000
        if path.stem.endswith("-modules"):
            continue  # tests/engines/test_module_facts.py
        facts = read_class_facts(path.stem)
        assert facts is not None
        assert path.stem == f"{facts.engine}-{facts.version}"
        assert facts.engine in BY_ID
        assert list(facts.classes) == sorted(facts.classes)


def test_data_files_are_read_by_verdicts_alone() -> None:
    program = "import sys, fp8pack, fp8pack.engines.judge as j; assert not j.read_class_facts.cache_info().currsize"
    subprocess.run([sys.executable, "-c", program], check=True)


# The program.

REGISTRY = """
_TEXT_GENERATION_MODELS = {"AForCausalLM": ("a", "A"), "BForCausalLM": ("vllm.models.b", "B"), "M": ("made", "M")}
_EMBEDDING_MODELS = {"AModel": ("a", "A"), **{key: value for key, value in _TEXT_GENERATION_MODELS.items()}}
_TRANSFORMERS_BACKEND_MODELS = {"TransformersForCausalLM": ("transformers", "T")}
_PREVIOUSLY_SUPPORTED_MODELS = {"OldForCausalLM": "0.9"}
"""
A = """
from vllm.model_executor.layers.linear import ColumnParallelLinear as Column, RowParallelLinear
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.layers.mamba.mixer import Mixer
from .utils import AutoWeightsLoader

class Gate(nn.Module):
    def __init__(self, quant_config, prefix):
        self.gate = Column(1, 2, quant_config=None, prefix=f"{prefix}.gate")
        self.up = Column(1, 2, quant_config=quant_config, prefix=f"{prefix}.up_proj")
        self.both = Column(1, 2, quant_config=quant_config)
        self.maybe = Column(1, 2, quant_config=quant_config if prefix else None)
        self.made = Column(1, 2, quant_config=derived(quant_config))
        self.open = Column(1, 2, **options)

class Other(Gate):
    def __init__(self):
        self.both = Column(1, 2)
        self.wk_weights = MergedColumnParallelLinear(1, [1, 1])

LAYERS = {"mamba": Mixer, "other": Other}

class A(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, vllm_config):
        self.layers = [LAYERS[kind](vllm_config) for kind in kinds]
        self.positional = RowParallelLinear(1, 2, vllm_config.quant_config)

    def load_weights(self, weights):
        mapping = [("wk_weights", "wk", 0), ("wk_weights", "w", 1), ("alone", "x", 0)]
        return AutoWeightsLoader(self).load_weights(weights)
"""
B = """
from vllm.model_executor.models.a import Gate

class B(Gate):
    pass
"""
MIXER = """
from vllm.model_executor.layers.linear import RowParallelLinear

class Mixer:
    def __init__(self):
        self.out_proj = RowParallelLinear(1, 2, bias=False)
"""
TREE = {
    "vllm/model_executor/models/__init__.py": "",
    "vllm/model_executor/models/registry.py": REGISTRY,
    "vllm/model_executor/models/a.py": A,
    "vllm/models/b/__init__.py": "from .impl import B",
    "vllm/models/b/impl.py": B,
    "vllm/model_executor/layers/mamba/mixer.py": MIXER,
}


def read(place: Path, output: Path, *options: str) -> dict[str, object]:
    command = [sys.executable, str(ROOT / "tools" / "read_engines.py"), str(place), "--output", str(output), *options]
    subprocess.run(command, check=True, capture_output=True)
    [path] = output.glob("*.json")
    found: dict[str, object] = json.loads(path.read_text())
    return found


def test_an_engine_is_read_from_its_wheel_and_from_its_source_with_the_same_bytes(tmp_path: Path) -> None:
    for name, text in TREE.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text(text)
    wheel = tmp_path / "vllm-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in TREE.items():
            archive.writestr(name, text)
    found = read(wheel, tmp_path / "a")
    read(tmp_path / "source", tmp_path / "b", "--engine", "vllm", "--version", "1.2")
    assert (tmp_path / "a" / "vllm-1.2.json").read_bytes() == (tmp_path / "b" / "vllm-1.2.json").read_bytes()
    assert (found["engine"], found["version"], found["removed"]) == ("vllm", "1.2", {"OldForCausalLM": "0.9"})
    classes = found["classes"]
    assert isinstance(classes, dict)
    assert set(classes) == {"AForCausalLM", "AModel", "BForCausalLM", "M"}
    assert classes["AForCausalLM"] == {
        "unquantized": ["gate", "out_proj", "wk_weights"],
        "unknown": ["maybe", "open"],
        "fused": {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "wk_weights": ["wk", "w"]},
        "kv_scales": True,
    }
    assert classes["BForCausalLM"] == {"unquantized": ["gate"], "unknown": ["maybe", "open"], "kv_scales": False}
    assert classes["M"] == {"unknown": ["*"]}


@pytest.mark.parametrize(
    ("stored", "where", "loads", "tp"),
    [(DYNAMIC, {}, True, (1,)), (DYNAMIC, {"tp": 2}, None, ()), (BLOCK, {}, None, ())],
    ids=["channel", "channel TP 2", "block"],
)
def test_a_projection_of_five_parts_is_known_at_tp_1_only(
    stored: Storage, where: dict[str, int], loads: bool | None, tp: tuple[int, ...]
) -> None:
    facts = replace(QWEN, architecture="Mamba2ForCausalLM", model_type="mamba2")
    verdict = judge(stored, "vllm", [weight("backbone.layers.0.mixer.in_proj", 4352, 2048, "ssm")], facts, **where)
    assert (verdict.loads, verdict.tp) == (loads, tp)
    assert "in_proj in 5 parts" in verdict.reason + verdict.note


def test_a_target_may_name_the_version_whose_classes_are_meant() -> None:
    newer = next(iter(set(known("vllm-0.33.0").classes) - set(known("vllm-0.32.0").classes)))
    facts = replace(QWEN, architecture=newer)
    case = make_case(DYNAMIC, dense(), facts)
    by_version = {
        target: next(each for each in judge_engines(case, parse_targets([target])) if each.engine == "vllm")
        for target in ("vllm", "vllm==0.33.0", "VLLM==0.32.0")
    }
    assert [each.loads for each in by_version.values()] == [True, True, None]
    assert [each.version for each in by_version.values()] == ["vLLM 0.33.0", "vLLM 0.33.0", "vLLM 0.32.0"]
    with pytest.raises(RecipeError, match=r"0\.31"):
        parse_targets(["vllm==0.31"])


def known(name: str) -> EngineFacts:
    found = read_class_facts(name)
    assert found is not None
    return found
