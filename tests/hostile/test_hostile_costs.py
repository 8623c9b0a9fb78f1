"""Small inputs that would cost much time or memory: each is refused, or costs little."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hostile.hostile_models import pack_into

import fp8pack
from fp8pack.errors import Fp8PackError, InputError, RecipeError
from fp8pack.limits import depth_of, time_limit
from fp8pack.modelfacts.believable import unbelievable
from fp8pack.modelfacts.patterns import Matcher, Pattern
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.modelrun import chat
from fp8pack.modelrun.prompts import Prompt, tokenize


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if what is done here takes longer."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


@pytest.mark.parametrize("head", ["[" * 60_000, "{" * 60_000, "a: " + "[" * 30_000 + "]" * 30_000, "- " * 30_000])
def test_a_model_card_that_nests_deeply_is_text(head: str, built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "README.md").write_text(f"---\n{head}\n---\nwords\n")
    with within(10):
        pack_into(model, tmp_path / "out")
    assert "words" in (tmp_path / "out" / "README.md").read_text()


def test_brackets_are_counted_by_their_depth() -> None:
    assert depth_of("[[]] {a: [1]} []") == 2
    assert depth_of("]]]][") == 0
    assert depth_of("words") == 0


@pytest.mark.parametrize("text", ["[" * 50_000, "a: " + "{" * 50_000, "- " * 600_000])
def test_a_recipe_that_nests_deeply_is_refused(text: str, built: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with within(10), pytest.raises(RecipeError, match=r"recipe\.yaml"):
        pack_into(built.single(tmp_path / "model"), tmp_path / "out", recipe=tmp_path / "recipe.yaml")


def deep_json(path: Path) -> None:
    path.write_text('{"a":' * 100_000)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, deep_json, endless])
@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.json", "prompts.jsonl", "calibration.safetensors"])
def test_a_file_that_is_no_file_or_nests_deeply_is_refused(
    make: Callable[[Path], None], name: str, built: Any, tmp_path: Path
) -> None:
    model, path = built.single(tmp_path / "model"), tmp_path / name
    make(path)
    with within(20), pytest.raises(Fp8PackError):
        if name.startswith("prompts"):
            fp8pack.calibrate(model, prompts=path)
        elif name.startswith("recipe"):
            pack_into(model, tmp_path / "out", recipe=path)
        else:
            pack_into(model, tmp_path / "out", calibration=path, scheme="FP8")


@pytest.mark.parametrize("make", [os.mkfifo, deep_json, endless])
def test_a_manifest_that_is_none_is_refused_or_replaced(
    make: Callable[[Path], None], built: Any, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "model")
    root = pack_into(model, tmp_path / "out").root
    (tmp_path / "out" / "fp8pack.json").unlink()
    make(tmp_path / "out" / "fp8pack.json")
    with within(20):
        for read in (fp8pack.inspect, fp8pack.load_packed, fp8pack.unpack):
            with pytest.raises(InputError):
                read(tmp_path / "out")
        assert not fp8pack.verify(tmp_path / "out").ok
        with pytest.raises(fp8pack.OutputError):
            pack_into(model, tmp_path / "out")
        assert pack_into(model, tmp_path / "out", overwrite=True).root == root


SLOW = r"re:(a+)+b"


def test_an_expression_that_takes_years_is_stopped_after_a_second() -> None:
    matcher = Matcher((Pattern(SLOW),), "ignore")
    with within(5), pytest.raises(RecipeError, match="takes longer than 1 s"):
        matcher.find("a" * 40)


def test_expressions_find_what_re_finds() -> None:
    matcher = Matcher((Pattern(r"re:.*\.(q|k)_proj"), Pattern("re:lm")), "ignore")
    for name, pattern in (("model.q_proj.weight", r"re:.*\.(q|k)_proj"), ("lm_head.weight", "re:lm"), ("x.lm", None)):
        found = matcher.find(name)
        assert (found.text if found else None) == pattern


def test_the_time_limit_is_taken_back() -> None:
    with pytest.raises(TimeoutError), time_limit(0.05):
        time.sleep(5)
    with time_limit(0.05):
        pass
    time.sleep(0.1)


class Letters:
    """A tokenizer of one token a letter, which counts what it is given; its template is Python."""

    def __init__(self, template: Callable[[], str] | None = None) -> None:
        self.chat_template = template
        self.longest = 0

    def __call__(self, text: str, truncation: bool = False, max_length: int = 0, **_: Any) -> dict[str, list[int]]:
        self.longest = max(self.longest, len(text))
        return {"input_ids": [1] * (min(len(text), max_length) if truncation else len(text))}

    def apply_chat_template(self, messages: Any, *_: Any, **__: Any) -> str:
        assert self.chat_template
        return self.chat_template()


CHAT = [Prompt("line 1", [{"role": "user", "content": "hello"}])]


def test_a_text_is_cut_before_it_is_tokenized() -> None:
    tokenizer = Letters()
    [(ids, cut)] = tokenize([Prompt("line 1", "x" * 50_000_000)], tokenizer, 64)
    assert (len(ids), cut) == (64, True)
    assert tokenizer.longest <= 64 * 256


def forever() -> str:
    while True:
        pass


def test_a_chat_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_MAX_SECONDS", 1.0)
    with within(10), pytest.raises(InputError, match="takes more than 1 s"):
        tokenize(CHAT, Letters(forever), 64)


def test_a_chat_template_that_takes_all_memory_is_stopped() -> None:
    with within(60), pytest.raises(InputError, match="chat template"):
        tokenize(CHAT, Letters(lambda: "x" * (6 << 30)), 64)


def test_a_long_rendering_is_cut() -> None:
    tokenizer = Letters(lambda: "fp8pack-probe" * 1_000_000)
    [(ids, cut)] = tokenize(CHAT, tokenizer, 64)
    assert (len(ids), cut) == (64, True)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_labels", "num_classes", "encoder_layers"])
def test_numbers_that_the_tensors_contradict_are_refused(key: str, built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, key: 10**9}))
    with within(20), pytest.raises(InputError, match=f"{key} = 1000000000"):
        fp8pack.calibrate(model)


def test_numbers_as_models_have_them_are_believed() -> None:
    spec = TensorSpec("head.weight", "BF16", (21_843, 768), "x", 0, 2 * 21_843 * 768)
    config = {"num_hidden_layers": 126, "num_labels": 21_843, "max_position_embeddings": 10_485_760, "depth": 40}
    assert unbelievable({**config, "text_config": {}, "vision_config": {"depth": 32}}, [spec]) == ""
