"""The command or code that loads a checkpoint in an engine."""

import shlex


def serve_command(engine: str, path: str, *, tp: int = 1, ep: int = 1, kv_cache: bool = False) -> str:
    """Return the shell command by which an engine serves a checkpoint, empty if it has none.

    tp: the tensor-parallel size. ep: groups of GPUs among which experts are divided. kv_cache: whether it has scales
        for a KV cache in FP8.
    """
    place = shlex.quote(path)
    parts = {
        "vllm": [
            "vllm serve",
            place,
            *_flag("--tensor-parallel-size", tp),
            *(["--enable-expert-parallel"] if ep > 1 else []),
            *_cache("fp8", kv_cache),
        ],
        "sglang": [
            "python -m sglang.launch_server --model-path",
            place,
            *_flag("--tp", tp),
            *_flag("--ep-size", ep),
            *_cache("fp8_e4m3", kv_cache),
        ],
        "tensorrt-llm": ["trtllm-serve", place, *_flag("--tp_size", tp), *_flag("--ep_size", ep)],
        "tgi": ["text-generation-launcher --model-id", place, *_flag("--num-shard", tp)],
        "lmdeploy": ["lmdeploy serve api_server", place, *_flag("--tp", tp), *_flag("--ep", ep)],
    }.get(engine, [])
    return " ".join(parts)


def load_code(engine: str, path: str, architecture: str = "") -> str:
    """Return the Python code by which a library loads a checkpoint, empty if it is none."""
    if engine == "transformers":
        name = architecture or "AutoModelForCausalLM"
        return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({path!r})"
    if engine == "cublaslt":
        return f"import fp8pack\n\npacked = fp8pack.load_packed({path!r}, device='cuda')"
    return ""


def _flag(name: str, size: int) -> list[str]:
    return [f"{name} {size}"] if size > 1 else []


def _cache(dtype: str, kv_cache: bool) -> list[str]:
    return [f"--kv-cache-dtype {dtype}"] if kv_cache else []
