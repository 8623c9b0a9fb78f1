"""Which FP8 checkpoints ComfyUI loads, as read in its code."""

from fp8pack.engines.engine import Engine, EngineRule

COMFYUI = Engine(
    "comfyui",
    "ComfyUI",
    "ComfyUI 0271a469",
    readers=(
        EngineRule("comfyui tensor *, comfyui-scaled tensor *", True, "ops.py, quant_ops.py"),
        EngineRule("comfyui mx *", True, "ops.py, quant_ops.py", "with scales in cuBLASLt's tiled order"),
        EngineRule("*", False, "ops.py", "it reads single files with its own markers"),
    ),
    loads_whole=True,
    is_for_language_models=False,
)
