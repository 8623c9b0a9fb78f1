"""Checkpoints built byte by byte, without fp8pack's own writer, and a guard against inputs that hang."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

from fp8pack.errors import Fp8PackError, InputError
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import prepare_pack
from fp8pack.planning.recipe import Request

HANG_SECONDS = 60.0
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 128}

Bits = NDArray[np.uint16]
Tensors = Mapping[str, Bits]


class Built:
    """What the tests build checkpoints from."""

    shards = SHARDS
    index = INDEX
    config = CONFIG

    def bits(self, seed: int = 0, rows: int = 128, columns: int = 128) -> Bits:
        """Return random BF16 weights as raw bits."""
        values = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    def layer(self, number: int) -> dict[str, Bits]:
        """Return two linears and a norm of one layer."""
        return {
            f"model.layers.{number}.self_attn.o_proj.weight": self.bits(2 * number),
            f"model.layers.{number}.mlp.down_proj.weight": self.bits(2 * number + 1),
            f"model.layers.{number}.input_layernorm.weight": self.bits(99, 1, 128)[0],
        }

    def shard(self, path: Path, tensors: Tensors) -> None:
        """Write BF16 tensors as one safetensors file."""
        document: dict[str, Any] = {}
        position = 0
        for name, bits in tensors.items():
            end = position + bits.nbytes
            document[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [position, end]}
            position = end
        raw = json.dumps(document).encode()
        data = b"".join(bits.tobytes() for bits in tensors.values())
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)

    def single(self, folder: Path, tensors: Tensors | None = None) -> Path:
        """Make a checkpoint of one model.safetensors; return its directory."""
        folder.mkdir(parents=True)
        self.shard(folder / "model.safetensors", self.layer(0) if tensors is None else tensors)
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
        return folder

    def sharded(self, folder: Path) -> Path:
        """Make a checkpoint of two shards, a layer in each, with its index; return its directory."""
        folder.mkdir(parents=True)
        weight_map = {}
        for number, name in enumerate(SHARDS):
            self.shard(folder / name, self.layer(number))
            weight_map |= dict.fromkeys(self.layer(number), name)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
        return folder

    def mend_index(self, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
        """Change the index of a checkpoint in place; return the directory."""
        document = json.loads((folder / INDEX).read_text())
        change(document)
        (folder / INDEX).write_text(json.dumps(document))
        return folder


def _raise_hang(signum: int, frame: FrameType | None) -> NoReturn:
    raise AssertionError("this input makes fp8pack hang")


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Break off a test whose input hangs; far above what any of them takes."""
    before = signal.signal(signal.SIGALRM, _raise_hang)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def built() -> Built:
    """Return the builder of checkpoints."""
    return Built()


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Return a function that expects `prepare_pack` to refuse a checkpoint in one line and to write nothing."""

    def refuse(
        model: Path,
        kind: type[Fp8PackError] = InputError,
        *,
        output: Path | None = None,
        request: Request | None = None,
        overwrite: bool = False,
    ) -> str:
        before = sorted(tmp_path.rglob("*"))
        options = WriteOptions(output=tmp_path / "out" if output is None else output, overwrite=overwrite)
        with pytest.raises(Fp8PackError) as caught:
            prepare_pack(model, request or Request(), options)
        message = caught.value.command_line
        assert type(caught.value) is kind
        assert len(message.splitlines()) == 1
        assert len(message) < 2000
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return refuse


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `fp8pack` in a process of its own, with an empty hub cache and no network."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fp8pack", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)

    return run
