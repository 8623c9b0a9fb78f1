"""Limits: memory for very many tensors, few descriptors for very many files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import MakeCheckpoint, llama_config, llama_tensors
from safetensors.numpy import save_file

EXPERTS, LAYERS = 150, 100
MOST_MIB = 150
MEASURED = """
import sys
from fp8pack.__main__ import main
try:
    main()
finally:
    # ru_maxrss would be that of the process that forked this one; how much of a library is mapped is up to the kernel
    with open("/proc/self/status") as status:
        kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in status) if "kB" in rest}
    print((kib["VmHWM"] - kib["RssFile"]) // 1024, file=sys.stderr)
"""


def packed_with_peak(model: Path, output: Path) -> int:
    """Pack in a process of its own; its peak of memory in MiB, without mapped files."""
    words = ["pack", str(model), "--scheme", "FP8_DYNAMIC", "-o", str(output), "-q"]
    done = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1])


@pytest.mark.slow
def test_45_000_tensors_are_packed_in_little_memory(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    small = make_checkpoint(llama_tensors(1))
    packed_with_peak(small, tmp_path / "first")  # a process of its own, too: it compiles what the next one loads
    model = tmp_path / "many"
    model.mkdir()
    config = llama_config(layers=LAYERS) | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    (model / "config.json").write_text(json.dumps(config | {"num_experts": EXPERTS}))
    weight_map = {}
    for layer in range(LAYERS):
        file = f"model-{layer:03}.safetensors"
        experts = [f"model.layers.{layer}.mlp.experts.{i}" for i in range(EXPERTS)]
        names = [f"{expert}.{leaf}.weight" for expert in experts for leaf in ("gate_proj", "up_proj", "down_proj")]
        nbytes = 64 * 64 * 2
        header = {
            name: {"dtype": "BF16", "shape": [64, 64], "data_offsets": [i * nbytes, (i + 1) * nbytes]}
            for i, name in enumerate(names)
        }
        raw = json.dumps(header).encode()
        (model / file).write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(nbytes * len(names)))
        weight_map |= dict.fromkeys(names, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert packed_with_peak(model, tmp_path / "out") < MOST_MIB
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(written) == 2 * EXPERTS * 3 * LAYERS
    assert list(written) == sorted(written)


def test_a_checkpoint_of_200_shards_needs_few_descriptors(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(200)]
    weight_map = {name: f"model-{i:05}-of-00200.safetensors" for i, name in enumerate(names, 1)}
    for name, file in weight_map.items():
        save_file({name: np.ones((64, 64), np.float16)}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "config.json").write_text(json.dumps(llama_config(layers=200)))
    out = str(tmp_path / "out")
    commands = [
        ["pack", str(model), "-o", out, "--scheme", "FP8_DYNAMIC"],
        *(["inspect", out], ["inspect", out, "--against", str(model)], ["verify", out, "--against", str(model)]),
        *(["diff", out, str(model)], ["unpack", out, "-o", str(tmp_path / "unpacked")]),
    ]
    for command in commands:
        line = ["bash", "-c", 'ulimit -n 32; exec "$@"', "bash", sys.executable, "-m", "fp8pack", *command]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
