"""A fixed sample of model types, by their tiny models; `make test-families` runs all that transformers has."""

from pathlib import Path

import pytest
from families.check_family import SCHEMES, Family, NotRun
from families.tiny_models import make_tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# Each for a kind: dense, experts of each layout, MLA, tied heads, renamed modules, linears split at load, linears of a
# class of their own, modules kept in float32, towers, state spaces.
SAMPLE = (
    *("llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe", "granitemoe", "glm4v_moe_text"),
    *("roberta", "whisper", "bailing_hybrid", "kimi_k25", "fuyu", "mllama", "nemotron_h", "deepseek_v4", "altclip"),
    *("gte", "jina_embeddings_v3", "nomic_bert", "dinov2", "falcon", "ibert", "t5", "mamba", "clip", "mask2former"),
)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_verdict_on_transformers_is_what_happens(model_type: str, tmp_path: Path) -> None:
    family = Family(make_tiny(model_type), model_type, tmp_path)
    for scheme in SCHEMES:
        try:
            outcome = family.check(scheme)
        except NotRun:
            assert scheme == "static"
            continue
        assert outcome.honest, outcome
        assert outcome.packed >= 0.95 or outcome.warned, outcome
        assert not outcome.unpacked, outcome
