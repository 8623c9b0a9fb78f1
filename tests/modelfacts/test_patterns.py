import pytest

from fp8pack.errors import RecipeError
from fp8pack.modelfacts.patterns import Matcher, Pattern


@pytest.mark.parametrize(
    ("pattern", "name", "means"),
    [
        ("lm_head", "lm_head.weight", True),
        ("lm_head.weight", "lm_head.weight", True),
        ("lm", "lm_head.weight", False),
        ("*.o_proj", "model.layers.0.self_attn.o_proj.weight", True),
        ("*.layers.0.*", "model.layers.0.self_attn.o_proj.weight", True),
        ("*.layers.0.*", "model.layers.10.self_attn.o_proj.weight", False),
        ("re:.*o_proj", "model.layers.0.self_attn.o_proj.weight", True),
        ("re:o_proj", "model.layers.0.self_attn.o_proj.weight", False),
        ("re:.*mlp.gate$", "model.layers.0.mlp.gate_proj.weight", False),
        ("model.layers.0.mlp.up_proj", "model_layers.0.mlp.up_proj.weight", False),
    ],
)
def test_a_pattern_means_a_tensor_or_its_module(pattern: str, name: str, means: bool) -> None:
    matcher = Matcher((Pattern("?" + pattern),), "--ignore")
    assert (matcher.find(name) is not None) is means


def test_a_pattern_that_means_nothing_is_an_error_unless_it_is_optional() -> None:
    matcher = Matcher((Pattern("lm_haed"), Pattern("?absent")), "--ignore")
    matcher.find("lm_head.weight")
    with pytest.raises(RecipeError, match=r"ignore 'lm_haed' matches no tensor.*'\?lm_haed'"):
        matcher.check()


def test_a_broken_expression_is_one_sentence() -> None:
    with pytest.raises(RecipeError, match="not a valid regular expression"):
        Matcher((Pattern("re:("),), "--only")
