"""The name, dtype and shape of a scale that readers of each quant method expect."""

from dataclasses import dataclass

from fp8pack.engines.engine import kind_of, matches_kind
from fp8pack.modelfacts.spec import Stored
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.granularity import Granularity


@dataclass(frozen=True, slots=True)
class ScaleLayout:
    """The scale of a weight [N, K] that readers expect: the end of its name, its dtypes, its shapes."""

    kinds: str
    suffix: str
    dtypes: tuple[str, ...]
    shapes: tuple[str, ...]
    source: str


_FLOATS = ("F32", "BF16", "F16")
SCALES = (
    ScaleLayout("fp8 block:*, auto-round block:*", "_scale_inv", _FLOATS, ("grid",), "vLLM fp8.py, DeepSeek-V3 README"),
    ScaleLayout("fp8 tensor *", "_scale", ("F32",), ("[]", "[1]"), "vLLM fp8.py, AutoFP8 quantize.py"),
    ScaleLayout("fp8/transformers *", "_scale_inv", ("F32",), ("[]",), "transformers finegrained_fp8.py"),
    ScaleLayout("compressed-tensors tensor *", "_scale", _FLOATS, ("[1]", "[]"), "compressed-tensors initialize.py"),
    ScaleLayout("compressed-tensors mx *", "_scale", ("U8",), ("grid",), "compressed-tensors compressors/mxfp8"),
    ScaleLayout("compressed-tensors *", "_scale", _FLOATS, ("grid",), "compressed-tensors initialize.py"),
    ScaleLayout("modelopt tensor *", "_scale", ("F32",), ("[]", "[1]"), "vLLM modelopt.py"),
    ScaleLayout("modelopt channel *", "_scale", ("F32",), ("[N]",), "vLLM modelopt.py"),
    ScaleLayout("modelopt block:*", "_scale", ("F32",), ("[rows, 1, cols, 1]",), "vLLM modelopt_block_quant.py"),
    ScaleLayout("modelopt mx *", "_scale", ("U8",), ("grid",), "vLLM modelopt.py"),
    ScaleLayout("mxfp8 mx *", "_scale_inv", ("U8",), ("grid",), "SGLang quantization/fp8.py"),
    ScaleLayout("quark tensor *", "_scale", ("F32",), ("[]", "[1]"), "vLLM quark/schemes/"),
    ScaleLayout("quark channel *", "_scale", ("F32",), ("[N]",), "vLLM quark/schemes/"),
    ScaleLayout("quark block:*", "_scale", ("F32", "F8_E8M0"), ("grid",), "vLLM quark/schemes/"),
    ScaleLayout("quark mx *", "_scale", ("U8",), ("grid",), "vLLM quark/schemes/"),
    ScaleLayout("fbgemm_fp8 *, w8a8_fp8 *", "_scale", ("F32",), ("grid",), "vLLM fbgemm_fp8.py, SGLang w8a8_fp8.py"),
    ScaleLayout("comfyui tensor *", "_scale", ("F32",), ("[]",), "ComfyUI QUANTIZATION.md"),
)


def scale_problem(storage: Storage, weight: str, shape: tuple[int, ...], scale: Stored) -> str | None:
    """Return why readers do not find or accept the scale of a weight [N, K], as text; None if they do."""
    kind = kind_of(storage)
    layout = next((row for row in SCALES if matches_kind(row.kinds, kind)), None)
    if layout is None:
        return None
    if scale.name != weight + layout.suffix:
        return f"{scale.name} is not called {weight + layout.suffix}"
    if scale.dtype not in layout.dtypes:
        return f"{scale.name} is {scale.dtype}, not {' or '.join(layout.dtypes)}"
    wanted = [_shape(form, shape, storage.granularity) for form in layout.shapes]
    if scale.shape not in wanted:
        return f"{scale.name} is {list(scale.shape)}, not {' or '.join(str(list(one)) for one in wanted)}"
    return None


def _shape(form: str, shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    rows, cols = granularity.scale_shape(shape)
    shapes: dict[str, tuple[int, ...]] = {
        "[]": (),
        "[1]": (1,),
        "[N]": (rows,),
        "[rows, 1, cols, 1]": (rows, 1, cols, 1),
        "grid": (rows, cols),
    }
    return shapes[form]
