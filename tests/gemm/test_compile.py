"""Our kernels compile to machine code for the GPUs that they are for, without one: exact division, FP8 products.

A program of its own compiles, since here the kernels may be defined for Triton's interpreter.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fp8pack.gemm import triton_kernels as kernels

POINTERS = {"x": "*bf16", "payload": "*u8", "amax": "*i32", "scales": "*fp32", "scale": "*fp32", "a": "*fp8e4nv",
            "b": "*fp8e4nv", "a_scale": "*fp32", "b_scale": "*fp32", "bias": "*bf16", "out": "*bf16"}

def assembly(name, capability, constants, warps, **types):
    kernel = getattr(kernels, name)
    types = POINTERS | types
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(arg),): value for arg, value in constants.items()})
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert built.asm["cubin"]
    return built.asm["ptx"]

found = {}
for capability in map(int, sys.argv[1:]):
    cast = capability >= 89
    block = dict(CAST=cast, BLOCK_M=4, BLOCK_K=1024)
    group = assembly("quantize_regions", capability, dict(G=128, MX=False, TILED=False, **block), 4)
    mx = assembly("quantize_regions", capability, dict(G=32, MX=True, TILED=True, **block), 4, scales="*u8")
    code = "*fp8e4nv" if cast else "*u8"
    sizes = dict(A_COLS=128, B_ROWS=128, B_COLS=128, ALONG_K=True, OPERAND=None if cast else triton.language.bfloat16,
                 E5M2=False, EVEN_K=True, BLOCK_M=128, BLOCK_N=128, BLOCK_K=128 if cast else 64, GROUP_M=8, bias=None)
    product = assembly("multiply", capability, sizes, 8, a=code, b=code)
    divisions = [line.split()[0] for text in (group, mx) for line in text.splitlines() if "div." in line]
    is_fp8 = "e4m3" in product or "kind::f8f6f4" in product
    words = [word for word in ("wgmma", "tcgen05.mma", "mma.sync") if is_fp8 and word in product]
    found[capability] = {"divisions": divisions, "fp8": words}
print(json.dumps(found))
"""


def test_kernels_compile_for_every_generation() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, "80", "89", "90", "100", "120"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for built in found.values():
        assert built["divisions"]
        assert set(built["divisions"]) == {"div.rn.f32"}
    assert [found[capability]["fp8"] for capability in ("80", "89", "90", "100", "120")] == [
        [],
        ["mma.sync"],
        ["wgmma"],
        ["tcgen05.mma"],
        ["mma.sync"],
    ]
