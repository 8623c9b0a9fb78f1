"""A checkpoint of 45,000 tensors takes little memory: what is kept of each is small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import MakeCheckpoint, llama_config, llama_tensors

import fp8pack

EXPERTS, LAYERS = 150, 100
MOST_MIB = 220
MEASURED = """
import sys
from fp8pack.__main__ import main
try:
    main()
finally:
    with open("/proc/self/status") as status:  # ru_maxrss would be that of the process that forked this one
        print(*(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""


@pytest.mark.slow
def test_45_000_tensors_are_packed_in_little_memory(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    fp8pack.pack(make_checkpoint(llama_tensors(1)), tmp_path / "first", scheme="FP8_DYNAMIC")  # compiles the kernels
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
    words = ["pack", str(model), "--scheme", "FP8_DYNAMIC", "-o", str(tmp_path / "out"), "-q"]
    done = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < MOST_MIB
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(written) == 2 * EXPERTS * 3 * LAYERS
    assert list(written) == sorted(written)
