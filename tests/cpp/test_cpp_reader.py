"""fp8pack.hpp reads and refuses what the Python reader reads and refuses, and gives the same values, bit for bit."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import verbs
from checkpoints import MakeCheckpoint, Tensors, llama_tensors, random_weight, read_tensors
from hostile_headers import ACCEPTED, REFUSED, VALID, Build
from numpy.typing import NDArray
from safetensors.numpy import save_file

import fp8pack
from fp8pack.checkpoint.calibration_file import write_calibration
from fp8pack.checkpoint.header import read_header
from fp8pack.errors import InputError
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.swizzle import swizzle
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.calibration import Calibration, Site
from fp8pack.planning.recipe import Request

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
INCLUDE = ROOT / "fp8pack" / "_data" / "include"
EXAMPLE = ROOT / "examples" / "cublaslt"
WEIGHT = "model.layers.0.mlp.up_proj.weight"
FLAGS = ["-std=c++17", "-Og", "-Wall", "-Wextra", "-Wshadow", "-Werror", f"-I{INCLUDE}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
REFUSED_EXIT = 3

Spec = tuple[str, str, list[int], int, int]


class Reader:
    """The compiled program."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def __call__(self, *arguments: str | Path, given: bytes = b"") -> bytes:
        done = subprocess.run([self._program, *arguments], input=given, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def refusal(self, *arguments: str | Path) -> str:
        done = subprocess.run([self._program, *arguments], capture_output=True, check=False)
        assert done.returncode == REFUSED_EXIT, done.stderr.decode()
        message = done.stderr.decode().removesuffix("\n")
        assert message.isprintable() and len(message) < 2000
        return message

    def lines(self, command: str, paths: list[Path]) -> list[dict[str, Any]]:
        """What it says of many files, in one process."""
        output = self(command, given="".join(f"{path}\n" for path in paths).encode())
        found = [json.loads(line) for line in output.splitlines()]
        assert len(found) == len(paths)
        return found


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Compile the program once, with sanitizers where the compiler has them."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path_factory.mktemp("cpp") / "read_checkpoint"
    command = [compiler, *FLAGS, str(Path(__file__).with_name("read_checkpoint.cpp")), "-o", str(program)]
    done = subprocess.run([*command, *SANITIZERS], capture_output=True, text=True, check=False)
    if done.returncode and ("asan" in done.stderr or "ubsan" in done.stderr):  # the linker finds no such library
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Reader(program)


def python_verdict(path: Path) -> list[Spec] | None:
    """The tensors of a file as the Python reader sees them; None if it refuses it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return [
            (spec.name, spec.dtype, list(spec.shape), spec.begin, spec.end)
            for spec in read_header(fd, path.name).tensors
        ]
    except InputError:
        return None
    finally:
        os.close(fd)


def check_verdict(found: dict[str, Any], path: Path) -> None:
    expected = python_verdict(path)
    if expected is None:
        message = found["error"]
        assert message.startswith(path.name), message
        assert message.isprintable() and len(message) < 2000
    else:
        assert [tuple(spec) for spec in found.get("tensors", found)] == expected, path.name


def write_files(folder: Path, cases: Mapping[str, Build]) -> list[Path]:
    paths = []
    for name, build in cases.items():
        paths.append(folder / f"{name}.safetensors")
        paths[-1].write_bytes(build())
    return paths


def test_every_malformed_header_is_refused(reader: Reader, tmp_path: Path) -> None:
    paths = write_files(tmp_path, REFUSED)
    for path, found in zip(paths, reader.lines("files", paths), strict=True):
        assert "error" in found, path.name
        check_verdict(found, path)


def test_every_odd_header_is_read_as_python_reads_it(reader: Reader, tmp_path: Path) -> None:
    paths = write_files(tmp_path, ACCEPTED)
    for path, found in zip(paths, reader.lines("files", paths), strict=True):
        assert "tensors" in found, path.name
        check_verdict(found, path)


NUMBERS = "-0 -0.0 0 00 01 1. .5 1.5 +1 --1 - 1e 1e+ 1e+5 1E-5 1e400 -1e400 1e-400 0e1 -0e1 0x10 1_0"
LONG = [sign + digit * count for sign in ("", "-") for digit in "19" for count in (4300, 4301)]
LONG += ["1" * 300 + "e9", "1" * 5000 + ".5", "\uff11", "\v1", "\u00a01", "1 // one", "1 /* one */"]
WORDS = "true tru truey True false null nul NaN -Infinity [1,] [,] [1 [1}} ] {,} {1:2}"
OBJECTS = ["", "[1 2]", '{"k"}', '{"k":1,}', '{"k":1,"k":1}', r'{"k":1,"\u006b":1}', '{"k":{"k":1}}', "'a'"]
TEXT = [
    r"\ud83d\ude00",
    r"\ud800",
    r"\ude00\ud83d",
    r"\ud800\n",
    r"\ud800\ud800\udc00",
    r"\\ud800",
    r"\u00e9",
    r"\u00zz",
]
TEXT += [r"\u00E", r"\U00000041", r"\x", r"\/\b\f\n\r\t\"\\", r"\u0000", "\t", "\x7f", "\u00e9\u20ac\U0001f600", "\\"]
DEPTHS = ["[" * depth + inside + "]" * depth for depth in (61, 62, 63, 64, 65) for inside in ("", "1", "{}", '{"k":1}')]
VALUES = [*NUMBERS.split(), *LONG, *WORDS.split(), *OBJECTS, *(f'"{text}"' for text in TEXT), *DEPTHS, '"']


def with_value(text: str) -> Build:
    """A file of one tensor, with this JSON text in a field that nobody reads."""
    raw = f'{{"a":{{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":{text}}}}}'.encode()
    return lambda: len(raw).to_bytes(8, "little") + raw + b"\0"


def test_values_that_nobody_reads_are_checked_as_strictly(reader: Reader, tmp_path: Path) -> None:
    paths = write_files(tmp_path, {f"value-{i}": with_value(text) for i, text in enumerate(VALUES)})
    verdicts = reader.lines("files", paths)
    for path, found in zip(paths, verdicts, strict=True):
        check_verdict(found, path)
    assert 20 < sum("error" in found for found in verdicts) < len(paths) - 20


NAMES = "80 c080 c1bf c2 e09fbf eda080 edbfbf e282 f08fbfbf f4908080 f5808080 ff fe e228a1 f09f98"  # no UTF-8
NAMES += " c2a0 dfbf e0a080 ed9fbf ee8080 efbfbf f0908080 f48fbfbf e280a8 c280 c29f 7f"


def test_names_are_counted_and_checked_in_characters(reader: Reader, tmp_path: Path) -> None:
    cases: dict[str, Build] = {}
    long = [letter.encode() * count for letter in "n\u20ac" for count in (4096, 4097)]
    escaped = [rb"\ud83d\ude00\u00E9\/\u0041\"\\", rb"\ud83d", rb"\u0000", rb"\t", rb"\u009f", rb"\u20ac"]
    for i, name in enumerate([*map(bytes.fromhex, NAMES.split()), *long, *escaped]):
        raw = b'{"' + name + b'":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        cases[f"name-{i}"] = lambda raw=raw: len(raw).to_bytes(8, "little") + raw + b"\0"  # type: ignore[misc]
    paths = write_files(tmp_path, cases)
    for path, found in zip(paths, reader.lines("files", paths), strict=True):
        check_verdict(found, path)


def mutations(count: int) -> Iterator[bytes]:
    """A valid file with bytes flipped, removed, doubled or replaced by others that mean something in JSON."""
    source = random.Random(7)
    header = len(VALID) - 16
    for _ in range(count):
        content = bytearray(VALID)
        for _ in range(source.choice([1, 1, 1, 2, 3])):
            place = source.randrange(header) if source.random() < 0.2 else source.randrange(8, header)
            match source.randrange(4):
                case 0:
                    content[place] ^= 1 << source.randrange(8)
                case 1:
                    content[place] = source.choice(b'{}[],:"0123456789-+.eE \\u\x00\xc2\x80\xff')
                case 2:  # the length stays true
                    content[place : place + 1] = b""
                    content[header - 1 : header - 1] = b" "
                case _:
                    content[place] = content[source.randrange(8, header)]
        yield bytes(content)


def test_mutations_of_a_header_get_the_verdict_of_python(reader: Reader, tmp_path: Path) -> None:
    paths = write_files(tmp_path, {str(i): (lambda raw=raw: raw) for i, raw in enumerate(mutations(800))})
    verdicts = reader.lines("files", paths)
    for path, found in zip(paths, verdicts, strict=True):
        check_verdict(found, path)
    assert sum("tensors" in found for found in verdicts) > 20
    assert sum("error" in found for found in verdicts) > 400


def test_a_file_that_is_none_is_refused(reader: Reader, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    paths = [tmp_path / f"{name}.safetensors" for name in ("fifo", "folder", "missing")]
    found = [line["error"] for line in reader.lines("files", paths)]
    assert found == [
        "fifo.safetensors is no regular file",
        "folder.safetensors is no regular file",
        "missing.safetensors cannot be opened: No such file or directory",
    ]


def pack(source: Path, output: Path, **parts: Any) -> Path:
    """Pack with these parts of a request, given by name."""
    asked = {"format": parse_format, "granularity": parse_granularity}
    request = Request(**{name: asked.get(name, lambda value: value)(value) for name, value in parts.items()})
    verbs.pack(source, request, WriteOptions(output))
    return output


def as_floats(raw: bytes) -> NDArray[np.uint32]:
    return np.frombuffer(raw, np.uint32)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:64", "block:128x128", "block:48x80", "mx"])
def test_a_weight_is_dequantized_to_the_same_bits(
    reader: Reader, make_checkpoint: MakeCheckpoint, tmp_path: Path, format: str, granularity: str
) -> None:
    weights = {
        f"model.layers.{i // 2}.mlp.{'up' if i % 2 else 'down'}_proj.weight": random_weight(shape, i)
        for i, shape in enumerate([(131, 200), (256, 384), (1, 1), (129, 33)])
    }
    source = make_checkpoint(weights | {"model.norm.weight": random_weight((200,))}, shards=2)
    output = pack(source, tmp_path / "out", format=format, granularity=granularity, quant_method="fp8pack")
    loaded = fp8pack.load_packed(output)
    described = json.loads(reader("weights", output))
    assert described.keys() == weights.keys()
    for name in weights:
        packed = loaded[name]
        assert isinstance(packed, fp8pack.PackedTensor)
        expected = packed.dequantize(torch.float32).numpy().view(np.uint32).ravel()
        np.testing.assert_array_equal(as_floats(reader("dequantize", output, name)), expected)
        halves = packed.dequantize(torch.bfloat16).view(torch.int16).numpy().tobytes()
        assert reader("bfloat16", output, name) == halves
        entry = described[name]
        assert (entry["shape"], entry["block"]) == (list(packed.shape), list(packed.block))
        assert (entry["granularity"], entry["source_dtype"]) == (granularity, "BF16")


SITES = {
    "input_layernorm.output self_attn.k_proj.input self_attn.q_proj.input self_attn.v_proj.input": 7.0,
    "self_attn.k": 12.0,
    "self_attn.v": 1.5,
    "self_attn.o_proj.input": 2.0,
    "post_attention_layernorm.output mlp.gate_proj.input mlp.up_proj.input": 40.0,
    "mlp.down_proj.input": 130.0,
}


def calibrate(path: Path) -> Path:
    """Write a calibration of one layer by hand: two tokens, of which one is a zero."""
    sites = []
    for points, amax in SITES.items():
        code = np.array([amax], ml_dtypes.bfloat16).view(np.uint16)
        names = tuple(f"model.layers.0.{point}" for point in points.split())
        bins, counts = np.array([0, *code], np.uint16), np.array([1, 1], np.int64)
        sites.append(Site(names, 2, bins, counts, code, np.ones(1), code))
    write_calibration(path, Calibration("", ("blake3:a",), {}, tuple(sites)))
    return path


def test_static_scales_are_read(reader: Reader, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    calibration = calibrate(tmp_path / "calibration.safetensors")
    request = Request(scheme="FP8", calibration=calibration, kv_cache=True, quant_method="fp8pack")
    output = tmp_path / "out"
    verbs.pack(make_checkpoint(llama_tensors(1)), request, WriteOptions(output))
    tensors = read_tensors(output)
    described = json.loads(reader("weights", output))
    assert len(described) == 7
    for name, entry in described.items():
        assert np.float32(entry["input_scale"]) == tensors[f"{name.removesuffix('.weight')}.input_scale"]
    kv = json.loads(reader("kv", output))
    assert kv.keys() == {"model.layers.0.self_attn.k", "model.layers.0.self_attn.v"}
    assert all(np.float32(scale) == tensors[f"{point}_scale"] for point, scale in kv.items())
    assert float(reader("product", output, WEIGHT).split()[0]) < 5e-3


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:128x128", "mx"])
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_the_buffers_of_the_example_multiply_to_the_dequantized_product(
    reader: Reader, make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str, format: str
) -> None:
    shapes = {WEIGHT: (131, 200), WEIGHT.replace("up", "down"): (300, 648)}
    source = make_checkpoint({name: random_weight(shape, 3) for name, shape in shapes.items()})
    output = pack(source, tmp_path / "out", granularity=granularity, format=format, quant_method="fp8pack")
    for name in shapes:
        product, activation = map(float, reader("product", output, name).split())
        assert 1e-4 < product < 2.5e-3  # the rounding to BF16
        assert 0.01 < activation < 0.04  # the rounding to E4M3


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@pytest.mark.parametrize("shape", [(131, 200), (256, 640), (1, 1)])
def test_scales_lie_as_cublaslt_reads_them(
    reader: Reader, make_checkpoint: MakeCheckpoint, tmp_path: Path, shape: tuple[int, int]
) -> None:
    n, k = shape
    source = make_checkpoint({WEIGHT: random_weight(shape, 5)})
    seen = {}
    for granularity in ("tensor", "channel", "block:128x128", "mx"):
        output = pack(source, tmp_path / granularity, granularity=granularity, quant_method="fp8pack")
        stored = read_tensors(output)[f"{WEIGHT}_scale_inv"]
        raw = reader("scales", output, WEIGHT)
        entry = json.loads(reader("weights", output))[WEIGHT]
        seen[entry["mode"]] = entry["padded"]
        if granularity == "mx":
            assert raw == swizzle(stored).tobytes()
            continue
        found = np.frombuffer(raw, np.float32)
        if granularity == "block:128x128":
            expected = np.zeros((round_up(n, 128) // 128, round_up(-(-k // 128), 4)), np.float32)
            expected[:, : stored.shape[1]] = stored
        else:
            expected = np.zeros(1 if granularity == "tensor" else round_up(n, 16), np.float32)
            expected[: stored.size] = stored.ravel()
        np.testing.assert_array_equal(found, expected.ravel())
    plain = [round_up(n, 16), round_up(k, 16)]
    assert seen == {"tensor": plain, "channel": plain, "block128": plain, "mx": [plain[0], round_up(k, 32)]}


def test_scales_that_lie_in_tiles_already_stay_as_they_are(reader: Reader, tmp_path: Path) -> None:
    name = "double_blocks.0.img_attn.qkv.weight"
    save_file({name: random_weight((160, 256))}, tmp_path / "x.safetensors")
    fp8pack.pack(
        tmp_path / "x.safetensors",
        tmp_path / "y.safetensors",
        granularity=parse_granularity("mx"),
        quant_method="comfyui",
        pack=(Pattern(name),),
    )
    output = tmp_path / "y.safetensors"
    entry = json.loads(reader("weights", output))[name]
    assert entry["tiled"]
    assert reader("scales", output, name) == read_tensors(output)[entry["scale"]].tobytes()
    packed = fp8pack.load_packed(output)[name]
    assert isinstance(packed, fp8pack.PackedTensor)
    expected = packed.dequantize(torch.float32).numpy().view(np.uint32).ravel()
    np.testing.assert_array_equal(as_floats(reader("dequantize", output, name)), expected)


def test_a_granularity_without_a_scale_mode_is_refused_for_a_gemm(
    reader: Reader, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    output = pack(make_checkpoint(), tmp_path / "out", granularity="group:64", quant_method="fp8pack")
    assert "has no scale mode of cuBLASLt, being group:64" in reader.refusal("scales", output, WEIGHT)
    assert "no packed weight" in reader.refusal("scales", output, "model.norm.weight")
    assert "no packed weight" in reader.refusal("scales", output, "nothing")


@pytest.mark.parametrize("method", ["compressed-tensors", "modelopt", "torchao"])
def test_every_convention_with_a_manifest_is_read(
    reader: Reader, make_checkpoint: MakeCheckpoint, tmp_path: Path, method: str
) -> None:
    output = pack(make_checkpoint(), tmp_path / "out", granularity="channel", quant_method=method)
    loaded = fp8pack.load_packed(output)
    for name in json.loads(reader("weights", output)):
        packed = loaded[name]
        assert isinstance(packed, fp8pack.PackedTensor)
        expected = packed.dequantize(torch.float32).numpy().view(np.uint32).ravel()
        np.testing.assert_array_equal(as_floats(reader("dequantize", output, name)), expected)


def test_the_example_rounds_to_e4m3_as_ml_dtypes_does(reader: Reader) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    grid = np.sort(codes[np.isfinite(codes)])
    ties = (grid[1:] + grid[:-1]) / 2
    values = np.concatenate([bits.view(np.float32), ties, np.nextafter(ties, 0), np.nextafter(ties, 999)])
    values = values[np.abs(values) <= 448].astype(np.float32)
    expected = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(np.frombuffer(reader("e4m3", given=values.tobytes()), np.uint8), expected)


Change = Callable[[dict[str, Any], dict[str, Any]], None]


def set_path(*path: Any, value: Any) -> Change:
    """A change of one field of the packed weight's entry."""

    def change(document: dict[str, Any], entry: dict[str, Any]) -> None:
        place: Any = entry
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


MANIFESTS: dict[str, tuple[Change, str]] = {
    "schema-2": (lambda document, _: document["fp8pack"].update(schema=2), "schema"),
    "schema-missing": (lambda document, _: document.pop("fp8pack"), "no manifest of fp8pack"),
    "schema-text": (lambda document, _: document["fp8pack"].update(schema="1"), "malformed"),
    "file-with-slash": (set_path("file", value="../model.safetensors"), "no file of this checkpoint"),
    "file-with-backslash": (set_path("file", value="..\\model.safetensors"), "no file of this checkpoint"),
    "file-absolute": (set_path("file", value="/etc/x.safetensors"), "no file of this checkpoint"),
    "file-dots": (set_path("file", value=".."), "no file of this checkpoint"),
    "file-empty": (set_path("file", value=""), "no file of this checkpoint"),
    "file-with-nul": (set_path("file", value="a\0.safetensors"), "no file of this checkpoint"),
    "file-missing": (set_path("file", value="other.safetensors"), "cannot be opened"),
    "payload-missing": (set_path("tensor", value="nothing"), "does not lie in"),
    "payload-is-another": (set_path("tensor", value="model.norm.weight"), "not what the manifest says"),
    "format-of-another-dtype": (set_path("format", value="e5m2"), "not what the manifest says"),
    "format-unknown": (set_path("format", value="e3m4"), "format"),
    "shape": (set_path("shape", value=[200, 131]), "not what the manifest says"),
    "shape-of-one-dimension": (set_path("shape", value=[131 * 200]), "not what the manifest says"),
    "shape-float": (set_path("shape", value=[131.0, 200]), "malformed"),
    "shape-negative": (set_path("shape", value=[-131, -200]), "malformed"),
    "shape-huge": (set_path("shape", value=[2**64, 1]), "malformed"),
    "granularity-unknown": (set_path("granularity", value="row"), "not known"),
    "granularity-zero": (set_path("granularity", value="group:0"), "not known"),
    "granularity-endless": (set_path("granularity", value="block:128x" + "9" * 40), "not known"),
    "granularity-other": (set_path("granularity", value="channel"), "do not fit channel"),
    "granularity-mx-of-floats": (set_path("granularity", value="mx"), "do not fit mx"),
    "layout-unknown": (set_path("layout", value="column-major"), "not known"),
    "action-unknown": (set_path("action", value="melted"), "action"),
    "scale-missing": (set_path("scale_inv", "tensor", value="nothing"), "does not lie in"),
    "scale-is-the-payload": (set_path("scale_inv", "tensor", value=WEIGHT), "does not lie in"),
    "scale-dtype": (set_path("scale_inv", "dtype", value="U8"), "not what the manifest says"),
    "scale-shape": (set_path("scale_inv", "shape", value=[4]), "not what the manifest says"),
    "scale-in-tiles": (set_path("scale_inv", "layout", value="tiles of 128 x 4"), "do not fit"),
    "scale-layout-unknown": (set_path("scale_inv", "layout", value="tiles"), "do not fit"),
    "tensor-left-out": (lambda document, _: document["tensors"].pop("model.norm.weight"), "not in the manifest"),
    "tensor-added": (lambda document, entry: document["tensors"].update(more=dict(entry)), "does not lie in"),
}


@pytest.fixture
def small(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A packed checkpoint of one weight in blocks, and a norm."""
    tensors: Tensors = {WEIGHT: random_weight((131, 200), 3), "model.norm.weight": random_weight((200,))}
    return pack(make_checkpoint(tensors), tmp_path / "small", granularity="block:128x128", quant_method="fp8pack")


def test_a_malformed_manifest_is_refused(reader: Reader, small: Path, tmp_path: Path) -> None:
    folders = []
    for name, (change, _) in MANIFESTS.items():
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "model.safetensors").hardlink_to(small / "model.safetensors")
        document = json.loads((small / "fp8pack.json").read_text())
        change(document, document["tensors"][WEIGHT])
        (folders[-1] / "fp8pack.json").write_text(json.dumps(document))
    for found, (name, (_, problem)) in zip(reader.lines("checkpoints", folders), MANIFESTS.items(), strict=True):
        assert problem in found["error"], name
        assert found["error"].isprintable()


TEXTS = {
    "empty": b"",
    "no-json": b"fp8pack",
    "array": b"[]",
    "cut": b'{"fp8pack": {"schema": 1}, "tensors": {',
    "twice": b'{"fp8pack": {"schema": 1}, "fp8pack": {"schema": 1}, "tensors": {}}',
    "deep": b'{"fp8pack": ' + b"[" * 100_000,
    "not-utf-8": b'{"\xff": 1}',
    "NaN": b'{"fp8pack": {"schema": 1, "x": NaN}, "tensors": {}}',
    "entry-as-array": b'{"fp8pack": {"schema": 1}, "tensors": {"a": []}}',
    "no-action": b'{"fp8pack": {"schema": 1}, "tensors": {"a": {"file": "model.safetensors"}}}',
}


def test_a_manifest_that_is_none_is_refused(reader: Reader, small: Path, tmp_path: Path) -> None:
    folders = []
    for name, text in TEXTS.items():
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "model.safetensors").hardlink_to(small / "model.safetensors")
        (folders[-1] / "fp8pack.json").write_bytes(text)
    folders.append(tmp_path)
    for found in reader.lines("checkpoints", folders):
        assert "fp8pack.json" in found["error"]


def test_mutations_of_a_manifest_never_crash(reader: Reader, small: Path, tmp_path: Path) -> None:
    raw, source, folders = (small / "fp8pack.json").read_bytes(), random.Random(3), []
    begin = raw.index(b'"tensors"')
    for i in range(300):
        folders.append(tmp_path / str(i))
        folders[-1].mkdir()
        (folders[-1] / "model.safetensors").hardlink_to(small / "model.safetensors")
        content = bytearray(raw)
        content[source.randrange(begin, len(raw))] = source.choice(b'{}[],:"0123456789-ex\\')
        (folders[-1] / "fp8pack.json").write_bytes(content)
    assert 50 < sum("error" in found for found in reader.lines("checkpoints", folders)) < 300


@pytest.mark.parametrize("cut", [1, 1000, 30_000])
def test_a_truncated_shard_is_refused(reader: Reader, small: Path, cut: int) -> None:
    path = small / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    assert reader.refusal("weights", small).startswith("model.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_a_scale_that_is_no_multiplier_is_refused(reader: Reader, small: Path, value: float) -> None:
    path = small / "model.safetensors"
    scale = read_tensors(path)[f"{WEIGHT}_scale_inv"].tobytes()
    content = path.read_bytes()
    assert content.count(scale) == 1
    path.write_bytes(content.replace(scale, np.float32(value).tobytes() + scale[4:]))
    assert "negative or not finite" in reader.refusal("dequantize", small, WEIGHT)


def test_a_single_file_is_read_with_the_manifest_beside_it(reader: Reader, tmp_path: Path) -> None:
    save_file(llama_tensors(), tmp_path / "x.safetensors")
    fp8pack.pack(tmp_path / "x.safetensors")
    described = json.loads(reader("weights", tmp_path / "x-FP8-block.safetensors"))
    assert described[WEIGHT]["file"] == "x-FP8-block.safetensors"
    (tmp_path / "x-FP8-block.safetensors").rename(tmp_path / "z.safetensors")
    (tmp_path / "x-FP8-block.fp8pack.json").rename(tmp_path / "z.fp8pack.json")
    assert "no file of this checkpoint" in reader.refusal("weights", tmp_path / "z.safetensors")
    assert "q.fp8pack.json" in reader.refusal("weights", tmp_path / "q.safetensors")


def find_cuda() -> list[str]:
    """What tells CMake where cuBLASLt is; skips where there is none."""
    roots = [Path(os.environ.get("FP8PACK_NVIDIA_ROOT", "/")), *(Path(folder) / "nvidia/cu13" for folder in sys.path)]
    for root in roots:
        if all((root / "include" / header).exists() for header in ("cublasLt.h", "crt/host_defines.h", "nv/target")):
            return [f"-DFP8PACK_NVIDIA_ROOT={root}"]
    if Path("/usr/local/cuda/include/cublasLt.h").exists():
        return ["-DCUDAToolkit_ROOT=/usr/local/cuda"]
    pytest.skip("no headers of cuBLASLt")


@pytest.fixture(scope="session")
def gemm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the example as its README says."""
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("no cmake or no g++")
    cuda, build = find_cuda(), tmp_path_factory.mktemp("gemm")
    for command in (
        ["cmake", "-S", str(EXAMPLE), "-B", str(build), "-DCMAKE_BUILD_TYPE=Debug", *cuda],
        ["cmake", "--build", str(build)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "gemm"


def test_the_example_agrees_on_the_cpu_and_is_honest_about_devices(gemm: Path, small: Path) -> None:
    done = subprocess.run([gemm, small, WEIGHT, "--cpu"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{WEIGHT}  block:128x128  M 16  N 131  K 200  on the CPU  error")
    done = subprocess.run([gemm, small], capture_output=True, text=True, check=False)
    unsupported = (1, "cuBLASLt has no algorithm for this scale mode on this device\n")
    assert done.returncode == 0 or (done.returncode, done.stderr) in (unsupported, (2, "no CUDA device\n"))
    done = subprocess.run([gemm, small / "nothing"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "fp8pack.json cannot be opened" in done.stderr
