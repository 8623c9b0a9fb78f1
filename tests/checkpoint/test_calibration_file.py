"""calibration.safetensors: what is written comes back, and any other file is refused with a sentence."""

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from blake3 import blake3
from numpy.typing import NDArray
from safetensors import safe_open

from fp8pack.checkpoint import shard_writer
from fp8pack.checkpoint.calibration_file import is_calibration, read_calibration, write_calibration
from fp8pack.errors import Fp8PackError, InputError, SpaceError
from fp8pack.planning.calibration import Calibration, Site

INF = 0x7F80
NUMPY_OF = {"U16": "<u2", "I64": "<i8", "BF16": "<u2", "F64": "<f8", "F32": "<f4", "I32": "<i4", "U8": "u1"}
KINDS = {
    "bins": "U16",
    "counts": "I64",
    "channel_amax": "BF16",
    "channel_squares": "F64",
    "prompt_amax": "BF16",
}


def random_site(seed: int, *points: str, tokens: int = 30, channels: int = 16, prompts: int = 4) -> Site:
    """Return the statistics of random values, counted here without the code under test."""
    random = np.random.default_rng(seed)
    values = (random.standard_normal((tokens, channels)) * 3).astype(ml_dtypes.bfloat16)
    bits = values.view(np.uint16) & 0x7FFF
    owners = random.integers(0, max(prompts, 1), tokens)
    bins, counts = np.unique(bits, return_counts=True)
    history = [int(bits[owners == i].max(initial=0)) for i in range(prompts)]
    return Site(
        points,
        tokens,
        bins.astype(np.uint16),
        counts.astype(np.int64),
        bits.max(axis=0, initial=0).astype(np.uint16),
        (values.astype(np.float64) ** 2).sum(axis=0),
        np.array(history, np.uint16),
    )


def random_calibration(seed: int = 0, prompts: int = 4, channels: int = 16) -> Calibration:
    """Return sites of all sorts: of several points, without tokens, and a set of all experts."""
    layer = "model.layers.0"
    shape = {"prompts": prompts, "channels": channels}
    some = 30 if prompts else 0
    return Calibration(
        "blake3:model",
        tuple(f"blake3:{seed}-{i}" for i in range(prompts)),
        {"max_length": 64, "batch_size": 1, "all_experts": True, "until_converged": False},
        (
            random_site(seed, f"{layer}.norm.output", f"{layer}.q_proj.input", tokens=some, **shape),
            random_site(seed + 1, f"{layer}.k", tokens=some, prompts=prompts, channels=3),
            random_site(seed + 2, f"{layer}.mlp.experts.0.down_proj.input", tokens=0, **shape),
            random_site(seed + 3, f"{layer}.mlp.experts.1.down_proj.input", tokens=some and 1, **shape),
        ),
        (
            random_site(seed + 4, f"{layer}.mlp.experts.0.down_proj.input", tokens=some, **shape),
            random_site(seed + 5, f"{layer}.mlp.experts.1.down_proj.input", tokens=some, **shape),
        ),
    )


def assert_same(found: Calibration, expected: Calibration) -> None:
    """Two calibrations agree in everything but the digest of their file."""
    for name in ("fingerprint", "prompts", "options"):
        assert getattr(found, name) == getattr(expected, name)
    for ours, theirs in ((found.sites, expected.sites), (found.all_experts, expected.all_experts)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            for entry in fields(Site):
                x, y = getattr(a, entry.name), getattr(b, entry.name)
                if isinstance(x, np.ndarray):
                    assert (x.dtype, x.tolist()) == (y.dtype, y.tolist()), (a.points, entry.name)
                else:
                    assert x == y


# What is written.


@pytest.mark.parametrize("prompts", [0, 1, 4, 65])
@pytest.mark.parametrize("channels", [1, 7, 16])
def test_what_is_written_comes_back(prompts: int, channels: int, tmp_path: Path) -> None:
    expected = random_calibration(prompts, prompts, channels)
    write_calibration(tmp_path / "c.safetensors", expected)
    found = read_calibration(tmp_path / "c.safetensors")
    assert_same(found, expected)
    assert found.digest == f"blake3:{blake3((tmp_path / 'c.safetensors').read_bytes()).hexdigest()}"
    assert is_calibration(tmp_path / "c.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_calibration_without_sites_or_prompts_comes_back(tmp_path: Path) -> None:
    empty = Calibration("", (), {}, ())
    write_calibration(tmp_path / "c.safetensors", empty)
    assert_same(read_calibration(tmp_path / "c.safetensors"), empty)


def test_names_and_options_of_any_script_come_back(tmp_path: Path) -> None:
    site = random_site(1, "modèle.层.0.投影.input", "a b/c.input")
    expected = Calibration("f", ("p1", "p2", "p3", "p4"), {"note": 'é "quoted" \\ 😀', "n": 1.5, "x": None}, (site,))
    write_calibration(tmp_path / "c.safetensors", expected)
    assert_same(read_calibration(tmp_path / "c.safetensors"), expected)


def test_the_same_calibration_gives_the_same_bytes_wherever_it_was_read_from(tmp_path: Path) -> None:
    expected = random_calibration(3)
    (tmp_path / "deeper").mkdir()
    first, second, third = tmp_path / "a.safetensors", tmp_path / "deeper" / "b.safetensors", tmp_path / "c.safetensors"
    write_calibration(first, expected)
    write_calibration(second, expected)
    write_calibration(third, read_calibration(second))
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    write_calibration(second, random_calibration(4, prompts=2))
    write_calibration(second, expected)  # over a file of another size
    assert first.read_bytes() == second.read_bytes()


def test_the_safetensors_library_sees_the_documented_names_dtypes_and_values(tmp_path: Path) -> None:
    import torch

    expected = random_calibration(5)
    path = tmp_path / "c.safetensors"
    write_calibration(path, expected)
    wanted = {
        f"{prefix}{site.points[0]}.{kind}": (dtype, getattr(site, kind))
        for prefix, sites in (("", expected.sites), ("all_experts/", expected.all_experts))
        for site in sites
        for kind, dtype in KINDS.items()
    }
    torch_of = {"U16": torch.uint16, "I64": torch.int64, "BF16": torch.bfloat16, "F64": torch.float64}
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == wanted.keys()
        metadata = json.loads(opened.metadata()["fp8pack_calibration"])
        for name, (dtype, values) in wanted.items():
            tensor = opened.get_tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (torch_of[dtype], values.shape)
            raw = tensor.view(torch.uint16) if dtype == "BF16" else tensor
            assert raw.numpy().tolist() == values.tolist()
            if dtype == "BF16":
                assert tensor.numel() == 0 or float(tensor.max()) >= 0
    assert (metadata["schema"], metadata["prompts"]) == (1, list(expected.prompts))
    assert [site["tokens"] for site in metadata["sites"]] == [site.tokens for site in expected.sites]


def test_every_tensor_lies_aligned(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    write_calibration(path, random_calibration(6, prompts=5, channels=7))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__" and entry["data_offsets"][0] != entry["data_offsets"][1]:
            begin = 8 + length + entry["data_offsets"][0]
            assert begin % np.dtype(NUMPY_OF[entry["dtype"]]).itemsize == 0, name


# What is refused. Files are built byte by byte, without fp8pack's own writer.


@dataclass
class Parts:
    """A calibration file in parts, one site and a set of all experts, to be changed before it is written."""

    document: Any
    tensors: dict[str, tuple[str, NDArray[Any]]]
    key: str = "fp8pack_calibration"
    metadata: str | None = None  # instead of the document
    shapes: dict[str, list[int]] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        text = json.dumps(self.document) if self.metadata is None else self.metadata
        header: dict[str, Any] = {"__metadata__": {self.key: text}}
        data = b""
        for name, (dtype, array) in self.tensors.items():
            raw = array.astype(NUMPY_OF[dtype], copy=False).tobytes()
            shape = self.shapes.get(name, list(array.shape))
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        encoded = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
        return path

    def add_moments(self, count: int, *, block: int = 2, dtype: str = "F64") -> None:
        """Add second moments of so many elements to the first site."""
        self.document["schema"] = 2
        self.document["sites"][0]["block"] = block
        self.tensors["a.input.second_moments"] = (dtype, np.ones((1, count), NUMPY_OF[dtype]))

    def edit(self, kind: str, change: Callable[[NDArray[Any]], Any], site: str = "a.input") -> None:
        """Change one tensor of a site."""
        dtype, array = self.tensors[f"{site}.{kind}"]
        array = array.copy()
        result = change(array)
        self.tensors[f"{site}.{kind}"] = (dtype, array if result is None else np.asarray(result))


def parts() -> Parts:
    """Return a file that is in order: 3 tokens of 2 channels in 2 prompts."""
    arrays: dict[str, tuple[str, Any]] = {
        "bins": ("U16", [0, 0x3F80, 0x4000]),  # 0, 1, 2
        "counts": ("I64", [1, 2, 3]),
        "channel_amax": ("BF16", [0x4000, 0x3F80]),
        "channel_squares": ("F64", [8.0, 6.0]),
        "prompt_amax": ("BF16", [0x3F80, 0x4000]),
    }
    tensors = {
        f"{prefix}a.input.{kind}": (dtype, np.array(values, NUMPY_OF[dtype]))
        for prefix in ("", "all_experts/")
        for kind, (dtype, values) in arrays.items()
    }
    document = {
        "schema": 1,
        "fingerprint": "blake3:f",
        "prompts": ["blake3:0", "blake3:1"],
        "options": {"max_length": 64},
        "growth_last_quarter": 1.0,
        "sites": [{"points": ["a.input", "b.input"], "tokens": 3}],
        "all_experts": [{"points": ["a.input", "b.input"], "tokens": 3}],
    }
    return Parts(document, tensors)


def refusal(path: Path, change: Callable[[], object]) -> str:
    with pytest.raises(Fp8PackError) as caught:
        change()
    message = caught.value.command_line
    assert type(caught.value) is InputError
    assert len(message.splitlines()) == 1
    assert len(message) < 2000
    assert path.name in message
    return message


def site_of(p: Parts) -> dict[str, Any]:
    return p.document["sites"][0]


def setting(**changes: Any) -> Callable[[Parts], object]:
    return lambda p: p.document.update(changes)


def editing(kind: str, change: Callable[[NDArray[Any]], Any], site: str = "a.input") -> Callable[[Parts], object]:
    return lambda p: p.edit(kind, change, site)


def put(index: int, value: Any) -> Callable[[NDArray[Any]], None]:
    def change(array: NDArray[Any]) -> None:
        array[index] = value

    return change


def retyped(kind: str, dtype: str) -> Callable[[Parts], object]:
    def change(p: Parts) -> None:
        p.tensors[f"a.input.{kind}"] = (dtype, p.tensors[f"a.input.{kind}"][1])

    return change


def reshaped(kind: str, shape: list[int]) -> Callable[[Parts], object]:
    return lambda p: p.shapes.update({f"a.input.{kind}": shape})


def wrapping(p: Parts) -> None:
    """Counts whose sum is 0 modulo 2^64, as the tokens say."""
    p.edit("bins", lambda array: np.array([1, 2, 3, 0x4000], "<u2"))
    p.edit("counts", lambda array: np.array([2**62] * 4, "<i8"))
    site_of(p)["tokens"] = 0


CONTRADICTIONS: dict[str, Callable[[Parts], object]] = {
    "fewer-bins-than-counts": editing("bins", lambda array: array[1:]),
    "more-bins-than-counts": editing("counts", lambda array: array[:-1]),
    "bins-not-ascending": editing("bins", put(1, 0)),
    "bins-descending": editing("bins", lambda array: array[::-1]),
    "a-count-of-zero": editing("counts", lambda array: np.array([0, 3, 3])),
    "a-negative-count": editing("counts", lambda array: np.array([-1, 4, 3])),
    "counts-that-are-not-tokens-times-channels": editing("counts", put(0, 2)),
    "tokens-that-are-not-what-was-counted": lambda p: site_of(p).update(tokens=4),
    "no-token-but-counts": lambda p: site_of(p).update(tokens=0),
    "counts-whose-sum-wraps-around": wrapping,
    "an-amax-that-no-bin-has": editing("channel_amax", put(0, 0x4040)),
    "a-bin-over-every-amax": editing("bins", put(2, 0x4040)),
    "no-channel-at-the-amax": editing("channel_amax", put(0, 0x3F80)),
    "a-prompt-over-the-amax": editing("prompt_amax", put(0, 0x4040)),
    "no-prompt-at-the-amax": editing("prompt_amax", put(1, 0x3F80)),
    "a-prompt-less": editing("prompt_amax", lambda array: array[1:]),
    "a-prompt-more": editing("prompt_amax", lambda array: [*array, 0]),
    "fewer-squares-than-channels": editing("channel_squares", lambda array: array[:1]),
    "a-square-that-is-nan": editing("channel_squares", put(0, np.nan)),
    "a-square-that-is-infinite": editing("channel_squares", put(0, np.inf)),
    "a-square-below-zero": editing("channel_squares", put(0, -1.0)),
    "no-channel-at-all": lambda p: (
        [p.edit(kind, lambda array: array[:0]) for kind in ("bins", "counts", "channel_amax", "channel_squares")],
        p.edit("prompt_amax", lambda array: array * 0),
        site_of(p).update(tokens=0),
    ),
    "an-infinite-amax": lambda p: [
        p.edit(kind, put(index, INF)) for kind, index in (("bins", 2), ("channel_amax", 0), ("prompt_amax", 1))
    ],
    "a-nan-for-amax": lambda p: [
        p.edit(kind, put(index, 0x7FC0)) for kind, index in (("bins", 2), ("channel_amax", 0), ("prompt_amax", 1))
    ],
    "a-sign-in-the-amax": lambda p: [
        p.edit(kind, put(index, 0xC000)) for kind, index in (("bins", 2), ("channel_amax", 0), ("prompt_amax", 1))
    ],
    "a-contradiction-among-all-experts": editing("channel_amax", put(0, 0x4040), "all_experts/a.input"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_statistics_that_contradict_each_other_are_refused(name: str, tmp_path: Path) -> None:
    file = parts()
    assert read_calibration(file.write(tmp_path / "good.safetensors")).sites[0].amax == 2.0
    CONTRADICTIONS[name](file)
    path = file.write(tmp_path / "bad.safetensors")
    assert "'" in refusal(path, lambda: read_calibration(path))


def twice_in(group: str, index: int) -> Callable[[Parts], object]:
    return lambda p: p.document[group][0].update(points=["a.input", *["b.input"] * 2][: index + 2])


def second_site(p: Parts) -> None:
    """Two sites that share their second point."""
    for kind in KINDS:
        p.tensors[f"c.input.{kind}"] = p.tensors[f"a.input.{kind}"]
    p.document["sites"].append({"points": ["c.input", "b.input"], "tokens": 3})


def second_expert(p: Parts) -> None:
    """The same among all experts."""
    for kind in KINDS:
        p.tensors[f"all_experts/c.input.{kind}"] = p.tensors[f"a.input.{kind}"]
    p.document["all_experts"].append({"points": ["c.input", "b.input"], "tokens": 3})


MALFORMED: dict[str, Callable[[Parts], object]] = {
    "a-tensor-is-missing": lambda p: p.tensors.pop("a.input.counts"),
    "a-tensor-of-all-experts-is-missing": lambda p: p.tensors.pop("all_experts/a.input.bins"),
    "a-tensor-belongs-to-no-site": lambda p: p.tensors.update({"x": ("U8", np.zeros(1, "u1"))}),
    "a-site-is-not-named": lambda p: p.document.update(sites=[]),
    "all-experts-are-not-named": lambda p: p.document.pop("all_experts"),
    "bins-are-BF16": retyped("bins", "BF16"),
    "amax-is-U16": retyped("channel_amax", "U16"),
    "prompts-are-U16": retyped("prompt_amax", "U16"),
    "squares-are-F32": retyped("channel_squares", "F32"),
    "counts-are-I32": retyped("counts", "I32"),
    "amax-has-two-dimensions": reshaped("channel_amax", [2, 1]),
    "squares-have-no-dimension": lambda p: (
        p.edit("channel_squares", lambda array: array[:1]),
        p.shapes.update({"a.input.channel_squares": []}),
    ),
    "a-point-twice-in-a-site": twice_in("sites", 1),
    "a-point-in-two-sites": second_site,
    "a-site-twice": lambda p: p.document["sites"].append(p.document["sites"][0]),
    "a-point-twice-among-all-experts": second_expert,
    "a-prompt-twice": setting(prompts=["blake3:0", "blake3:0"]),
    "the-key-is-another": lambda p: setattr(p, "key", "fp8pack_calibrations"),
    "the-metadata-is-no-JSON": lambda p: setattr(p, "metadata", "{"),
    "the-metadata-is-empty": lambda p: setattr(p, "metadata", ""),
    "the-metadata-is-a-list": lambda p: setattr(p, "metadata", "[1]"),
    "the-metadata-is-null": lambda p: setattr(p, "metadata", "null"),
    "the-metadata-is-a-number": lambda p: setattr(p, "metadata", "1"),
    "the-metadata-is-text": lambda p: setattr(p, "metadata", '"schema"'),
    "the-metadata-is-deep": lambda p: setattr(p, "metadata", '{"schema":' + "[" * 100_000),
    "no-schema": lambda p: p.document.pop("schema"),
    "schema-3": setting(schema=3),
    "schema-is-a-switch": setting(schema=True),
    "moments-of-no-site": lambda p: p.add_moments(1, block=0),
    "moments-are-missing": lambda p: site_of(p).update(block=2),
    "moments-are-F32": lambda p: p.add_moments(3, dtype="F32"),
    "moments-are-too-few": lambda p: p.add_moments(2),
    "moments-are-too-many": lambda p: p.add_moments(4),
    "moments-have-another-block": lambda p: p.add_moments(1, block=1),
    "moments-have-a-negative-block": lambda p: p.add_moments(3, block=-1),
    "schema-0": setting(schema=0),
    "schema-is-text": setting(schema="1"),
    "schema-is-long": setting(schema="1" * 100_000),
    "schema-has-lines": setting(schema="1\nfp8pack: all is well"),
    "schema-is-a-list": setting(schema=[1]),
    "a-field-is-missing": lambda p: p.document.pop("prompts"),
    "a-field-is-not-known": setting(extra=1),
    "an-unknown-field-has-lines": setting(**{"a\nfp8pack: all is well": 1}),
    "an-unknown-field-is-long": setting(**{"a" * 100_000: 1}),
    "an-unknown-field-of-a-site": lambda p: site_of(p).update(extra=1),
    "a-prompt-is-no-text": setting(prompts=["blake3:0", 1]),
    "prompts-are-text": setting(prompts="ab"),
    "options-are-a-list": setting(options=[]),
    "fingerprint-is-null": setting(fingerprint=None),
    "tokens-are-negative": lambda p: site_of(p).update(tokens=-3),
    "tokens-are-a-fraction": lambda p: site_of(p).update(tokens=3.5),
    "tokens-are-huge": lambda p: site_of(p).update(tokens=10**30),
    "tokens-are-infinite": lambda p: setattr(
        p, "metadata", json.dumps(p.document).replace('"tokens": 3', '"tokens": 1e999')
    ),
    "no-points": lambda p: site_of(p).update(points=[]),
    "a-point-is-no-text": lambda p: site_of(p).update(points=[1]),
    "a-point-is-long": lambda p: site_of(p).update(points=["a" * 100_000]),
    "a-point-has-lines": lambda p: site_of(p).update(points=["a\nfp8pack: all is well"]),
    "a-point-is-half-a-character": lambda p: site_of(p).update(points=["\ud800"]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_with_one_line(name: str, tmp_path: Path) -> None:
    file = parts()
    MALFORMED[name](file)
    path = file.write(tmp_path / "bad.safetensors")
    refusal(path, lambda: read_calibration(path))


@pytest.mark.parametrize("place", ["prompts", "points", "fingerprint", "options"])
def test_half_a_character_is_refused_or_can_be_written_again(place: str, tmp_path: Path) -> None:
    """JSON can name a lone surrogate, which no file can be written with."""
    file = parts()
    half = "\ud800"
    if place == "points":
        site_of(file)["points"] = ["a.input", half]
    else:
        file.document[place] = {"prompts": ["p", half], "fingerprint": half, "options": {"a": half}}[place]
    path = file.write(tmp_path / "odd.safetensors")
    try:
        found = read_calibration(path)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        write_calibration(tmp_path / "again.safetensors", found)
        assert_same(read_calibration(tmp_path / "again.safetensors"), found)


def test_a_file_whose_tensors_lie_in_another_order_or_unaligned_is_read(tmp_path: Path) -> None:
    file = parts()
    file.tensors = dict(reversed(file.tensors.items()))
    found = read_calibration(file.write(tmp_path / "c.safetensors"))
    assert (found.sites[0].tokens, found.sites[0].channel_squares.tolist()) == (3, [8.0, 6.0])


@pytest.mark.parametrize("cut", [0, 5, 8, 100, -1, -40])
def test_a_file_that_was_cut_off_is_refused(cut: int, tmp_path: Path) -> None:
    path = parts().write(tmp_path / "bad.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    for call in (read_calibration, is_calibration):
        refusal(path, lambda call=call: call(path))


def test_a_file_that_goes_on_is_refused(tmp_path: Path) -> None:
    path = parts().write(tmp_path / "bad.safetensors")
    path.write_bytes(path.read_bytes() + b"\0")
    refusal(path, lambda: read_calibration(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "text.safetensors").write_text("{}")
    for name in ("folder", "pipe", "text", "absent"):
        path = tmp_path / f"{name}.safetensors"
        refusal(path, lambda path=path: read_calibration(path))


def test_a_weights_file_is_no_calibration(tmp_path: Path) -> None:
    file = parts()
    file.key = "format"
    path = file.write(tmp_path / "model.safetensors")
    assert not is_calibration(path)
    assert "is not a calibration file" in refusal(path, lambda: read_calibration(path))


def test_a_file_of_a_terabyte_is_refused_without_being_read(tmp_path: Path) -> None:
    """A sparse file claims a tensor that belongs to no site: its header is enough to see that."""
    file = parts()
    path = file.write(tmp_path / "large.safetensors")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header["x"] = {"dtype": "U8", "shape": [1 << 40], "data_offsets": [len(data), len(data) + (1 << 40)]}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    os.truncate(path, 8 + len(encoded) + len(data) + (1 << 40))
    program = (
        "import sys; from pathlib import Path\n"
        "from fp8pack.checkpoint.calibration_file import read_calibration\n"
        "from fp8pack.errors import InputError\n"
        "try: read_calibration(Path(sys.argv[1]))\n"
        "except InputError as error: print(error)\n"
    )
    limit = 4 << 30
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1


# Killed, or out of space.

DYING = """
import os, signal, sys
from pathlib import Path
from fp8pack.checkpoint.calibration_file import read_calibration, write_calibration

path = Path(sys.argv[1])
new = read_calibration(path.with_name("new.safetensors"))

def die_at(last):
    count = 0
    def counted(call, name):
        def inner(*arguments, **options):
            nonlocal count
            if name != "open" or arguments[1] & os.O_CREAT:
                count += 1
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return inner
    for name in ("open", "pwrite", "ftruncate", "fdatasync", "fsync", "rename", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name), name))

for last in range(1, 200):
    child = os.fork()
    if child == 0:
        die_at(last)
        write_calibration(path, new)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(int(killed), read_calibration(path).fingerprint, flush=True)
    write_calibration(path, read_calibration(path.with_name("old.safetensors")))
    if not killed:
        break
"""


def test_a_write_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    for name in ("old", "new"):
        calibration = random_calibration(len(name), prompts=len(name))
        named = Calibration(name, calibration.prompts, {}, calibration.sites)
        write_calibration(tmp_path / f"{name}.safetensors", named)
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "old.safetensors").read_bytes())
    command = [sys.executable, "-c", DYING, str(tmp_path / "c.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    seen = [line.split() for line in done.stdout.splitlines()]
    states = [name for _, name in seen]
    assert seen[-1] == ["0", "new"]
    assert len(seen) > 10
    assert states == sorted(states, reverse=True), "old until the one moment from which on it is new"
    assert states[0] == "old"


@pytest.mark.parametrize("nth", [1, 2, 5, 20])
def test_a_disk_that_gets_full_leaves_the_old_file_and_nothing_else(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.safetensors"
    write_calibration(path, random_calibration(1))
    before, genuine, calls = path.read_bytes(), os.pwrite, []

    def full(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")
        return genuine(*arguments)

    monkeypatch.setattr(shard_writer.os, "pwrite", full)
    with pytest.raises(SpaceError, match="no space left"):
        write_calibration(path, random_calibration(2))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_place_that_is_no_directory_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(Fp8PackError):
        write_calibration(tmp_path / "absent" / "c.safetensors", random_calibration(1))
