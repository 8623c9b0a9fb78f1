"""Fixtures for every test: a checkpoint on disk, and a cache of compiled kernels."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import MakeCheckpoint, Tensors, llama_config, llama_tensors
from safetensors.numpy import save_file


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Write tensors as a model directory, in one file or in shards with an index, and return its path."""

    def make(tensors: Tensors | None = None, *, name: str = "model", shards: int = 1, config: Any = None) -> Path:
        tensors = llama_tensors() if tensors is None else tensors
        folder = tmp_path / name
        folder.mkdir()
        names = list(tensors)
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        files = files if shards > 1 else ["model.safetensors"]
        weight_map = {tensor: files[i * shards // len(names)] for i, tensor in enumerate(names)}
        for file in files:
            save_file({key: tensors[key] for key in names if weight_map[key] == file}, folder / file, {"format": "pt"})
            (folder / file).chmod(0o644)
        if shards > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(llama_config() if config is None else config, indent=2))
        return folder

    return make


@pytest.fixture(autouse=True, scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile the kernels once for all tests, also those in child processes."""
    before = os.environ.get("FP8PACK_CACHE_DIR")
    os.environ["FP8PACK_CACHE_DIR"] = str(tmp_path_factory.mktemp("kernels"))
    yield
    if before is None:
        del os.environ["FP8PACK_CACHE_DIR"]
    else:
        os.environ["FP8PACK_CACHE_DIR"] = before
