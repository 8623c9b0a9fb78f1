"""Fixtures for every test: a checkpoint on disk, and a cache of compiled kernels; what goes to which worker when."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import MakeCheckpoint, Tensors, llama_config, llama_tensors
from safetensors.numpy import save_file

WORKER = "PYTEST_XDIST_WORKER"
if WORKER in os.environ:  # each worker has a core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the long ones first, so that no worker is alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


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
    """Compile the kernels once for all tests, also those of other workers and in child processes.

    A cache that is set already stays from run to run.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if WORKER in os.environ else folder) / "kernels"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FP8PACK_CACHE_DIR", os.environ.get("FP8PACK_CACHE_DIR", str(folder)))
        yield
