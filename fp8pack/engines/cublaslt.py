"""Which FP8 weights cuBLASLt multiplies after load_packed(), as read in its code."""

from fp8pack.engines.engine import INFERRED, REPORTED, Engine, EngineRule
from fp8pack.engines.gpus import BEFORE_ADA

CUBLASLT = Engine(
    "cublaslt",
    "load_packed() with cuBLASLt",
    "cuBLASLt 12.9, as nvmath-python 1.0.0 and torch 2.15 call it",
    readers=(
        EngineRule(
            "* none",
            False,
            "nvmath linalg/advanced",
            "it multiplies FP8 by FP8, and these activations stay as they are",
        ),
        EngineRule("* tensor *", True, "MATMUL_MATRIX_SCALE_SCALAR_32F"),
        EngineRule("* channel *", True, "MATMUL_MATRIX_SCALE_OUTER_VEC_32F, NVIDIA/CUDALibrarySamples#270"),
        EngineRule("* block:128x128 *", True, "MATMUL_MATRIX_SCALE_BLK128x128_32F, NVIDIA/CUDALibrarySamples#270"),
        EngineRule("* mx *", True, "MATMUL_MATRIX_SCALE_VEC32_UE8M0"),
        EngineRule("*", False, "nvmath bindings/cycublasLt.pxd", "it has no such mode of scaling"),
    ),
    on_gpu=(
        EngineRule("*", False, "the library", "it runs on NVIDIA GPUs only", "", INFERRED, ("gfx*",)),
        EngineRule("* tensor *", True, "nvmath linalg/advanced", "on SM89 and later", only=("any",)),
        EngineRule("*", False, "nvmath linalg/advanced", "it multiplies FP8 from SM89 on", only=("sm70", *BEFORE_ADA)),
        EngineRule(
            "* channel *, * block:*", True, "NVIDIA/CUDALibrarySamples#270", "on SM90", evidence=REPORTED, only=("any",)
        ),
        EngineRule(
            "* channel *, * block:*",
            False,
            "NVIDIA/CUDALibrarySamples#270",
            "it has these scales on SM90 only",
            evidence=REPORTED,
            only=("sm89", "sm1*"),
        ),
        EngineRule("* mx *", True, "nvmath linalg/advanced", "on SM100 and later", only=("any",)),
        EngineRule("* mx *", False, "nvmath linalg/advanced", "it has MX scales from SM100 on", only=("sm89", "sm90")),
    ),
    loads_whole=True,
    is_for_language_models=False,
)
