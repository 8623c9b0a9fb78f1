import shlex

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
    matcher = Matcher((Pattern("?" + pattern),), "ignore")
    assert (matcher.find(name) is not None) is means


def test_a_pattern_that_means_nothing_is_an_error_unless_it_is_optional() -> None:
    matcher = Matcher((Pattern("lm_haed"), Pattern("?absent")), "ignore")
    matcher.find("model.norm.weight")
    with pytest.raises(RecipeError, match=r"^ignore pattern 'lm_haed' matches no tensor$") as caught:
        matcher.check()
    assert caught.value.command_hint == "check the name; --ignore '?lm_haed' also accepts no match"
    assert caught.value.hint == "check the name; ignore='?lm_haed' also accepts no match"


NAMES = [
    *(f"model.layers.{layer}.{leaf}.weight" for layer in range(12) for leaf in ("self_attn.o_proj", "mlp.up_proj")),
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("pattern", "said", "typed"),
    [
        ("o_proj", "did you mean '*.o_proj' (12 tensors)?", "'*.o_proj'"),
        ("o_proj.weight", "did you mean '*.o_proj.weight' (12 tensors)?", "'*.o_proj.weight'"),
        ("layers.1", "did you mean '*.layers.1.*' (2 tensors)?", "'*.layers.1.*'"),
        ("model.layers.1", "did you mean 'model.layers.1.*' (2 tensors)?", "'model.layers.1.*'"),
        ("up", "did you mean '*up*' (12 tensors)?", "'*up*'"),
        ("lm_haed", "did you mean 'lm_head' (1 tensor)?", "lm_head"),
        ("up_porj", "did you mean '*.up_proj' (12 tensors)?", "'*.up_proj'"),
        ("*.up_porj", "did you mean '*.up_proj' (12 tensors)?", "'*.up_proj'"),
        (
            "model.layers.3.mlp.upproj",
            "did you mean 'model.layers.3.mlp.up_proj' (1 tensor)?",
            "model.layers.3.mlp.up_proj",
        ),
        ("re:layers.1", "re: must match from the start of the name", r"'re:.*layers\.1\..*'"),
        ("re:o_proj$", "re: must match from the start of the name", "'re:.*o_proj$'"),
        ("re:up_proj|o_proj", "re: must match from the start of the name", "'re:.*(up_proj|o_proj)'"),
    ],
)
def test_a_pattern_that_matches_nothing_offers_the_nearest_that_does(pattern: str, said: str, typed: str) -> None:
    """And what is offered matches as many tensors as is said."""
    matcher = Matcher((Pattern(pattern),), "ignore")
    assert not any([matcher.find(name) for name in NAMES])
    with pytest.raises(RecipeError) as caught:
        matcher.check()
    assert str(caught.value) == f"ignore pattern {pattern!r} matches no tensor: {said}"
    assert caught.value.command_hint == f"--ignore {typed}"
    offered = Matcher(tuple(map(Pattern, shlex.split(typed))), "ignore")
    found = sum(offered.find(name) is not None for name in NAMES)
    assert found == (int(said.partition("(")[2].split()[0]) if "(" in said else {"re:layers.1": 2}.get(pattern, found))
    offered.check()


def test_patterns_of_no_option_are_hinted_as_text() -> None:
    matcher = Matcher((Pattern("o_proj"),), "rule")
    matcher.find(NAMES[0])
    with pytest.raises(RecipeError, match=r"^rule pattern 'o_proj' matches no tensor") as caught:
        matcher.check()
    assert caught.value.hint == "write '*.o_proj'"


def test_a_hint_with_backslashes_is_a_raw_string_in_python() -> None:
    matcher = Matcher((Pattern("re:layers.0"),), "ignore")
    matcher.find(NAMES[0])
    with pytest.raises(RecipeError) as caught:
        matcher.check()
    assert caught.value.hint == r"ignore=r're:.*layers\.0\..*'"


def test_a_broken_expression_is_one_sentence() -> None:
    with pytest.raises(RecipeError, match="not a valid regular expression"):
        Matcher((Pattern("re:("),), "only")
