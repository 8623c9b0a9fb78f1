"""Weights of 4 and 8 bits that are no FP8: which tensors belong to one, by the names of those who write them.

gpt-oss                 `<experts>_blocks` U8 [E, N, K/32, 16], `<experts>_scales` U8 [E, N, K/32]
compressed-tensors      `weight_packed` U8 [N, K/2] with
    MXFP4               `weight_scale` U8 [N, K/32]
    NVFP4               `weight_scale` F8_E4M3 [N, K/16], `weight_global_scale` F32, which divides
    INT4, INT8          `weight_packed` I32 [N, ceil(K bits / 32)], `weight_scale`, `weight_shape` [2], if asymmetric
                        `weight_zero_point` I32 [ceil(N bits / 32), groups]
    INT8, not packed    `weight` I8 [N, K], `weight_scale`, if asymmetric `weight_zero_point` I8
ModelOpt NVFP4          `weight` U8 [N, K/2], `weight_scale` F8_E4M3 [N, K/16], `weight_scale_2` F32, which multiplies
Quark MXFP4             `weight` U8 [N, K/2], `weight_scale` U8 [N, K/32]
DeepSeek-V4 MXFP4       `weight` I8 [N, K/2], `scale` F8_E8M0 [N, K/32]

Sources: compressed-tensors 0.20 compressors/*/base.py; transformers 5.24 integrations/mxfp4.py, finegrained_fp8.py;
ModelOpt 0.47 quantization/qtensor/nvfp4_tensor.py. In all of them the lower nibble comes first.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np

from fp8pack.checkpoint.source import Source
from fp8pack.errors import InputError
from fp8pack.modelfacts.contents import Quantized
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.numerics.formats import E2M1, INT4, INT8, SIGNED_INT8, TableFormat
from fp8pack.numerics.granularity import MX, Granularity
from fp8pack.units import ceil_div

NVFP4 = Granularity("group:16", 1, 16)
_BLOCKS = re.compile(r"(?P<fused>(.+\.)?experts\.\w+)_blocks$")
_EXPONENTS, _FLOATS = ("U8", "F8_E8M0"), ("F32", "BF16", "F16")
_SHAPES = {"I64": np.int64, "I32": np.int32}
_GROUP, _BLOCK = 32, 16  # values that share a scale, and their bytes
_ORIGINAL = "use the BF16 original of this model"
_AGAIN = "download the checkpoint again"
_DECOMPRESS = "load it with transformers and `CompressedTensorsConfig(dequantize=True)`, save it, and use that"
_INPUTS = ("input_scale", "input_global_scale")  # of FP4 activations: FP8 has no use for them
_ALTERED = ("weight_g_idx", "pre_quant_scale")  # the order of the columns, or a factor of each
Regions = Callable[[TensorSpec, TensorSpec], Granularity]  # of a weight and its scales; raises InputError


@dataclass(frozen=True, slots=True)
class LowBits:
    """A weight under its own name and shape, how it is dequantized, and what else belongs to it."""

    spec: TensorSpec
    quantized: Quantized
    others: tuple[TensorSpec, ...] = ()


class LowBitsReader:
    """Recognizes payloads of FP4 and of integers.

    bits: of integers, as the configuration declares them, empty if it does not. asymmetric: whether it declares that
    all of them have zero points. regions: finds what shares a scale of integers. dtype: of the floats before.
    """

    def __init__(
        self,
        source: Source,
        specs: Mapping[str, TensorSpec],
        *,
        bits: tuple[int, ...],
        asymmetric: bool,
        regions: Regions,
        dtype: str,
    ) -> None:
        self._source, self._specs, self._dtype = source, specs, dtype
        self._bits, self._asymmetric, self._regions = bits, asymmetric, regions

    def find(self, payload: TensorSpec) -> LowBits | None:
        """Return the weight of a payload, None if it is another tensor.

        Raises:
            InputError: a tensor that belongs to it is missing, or has another shape or dtype.
        """
        if payload.dtype == "U8" and (match := _BLOCKS.match(payload.name)):
            return self._fused(payload, match["fused"])
        module, _, leaf = payload.name.rpartition(".")
        match leaf, payload.dtype:
            case "weight_packed", "U8":
                return self._fp4(payload, module, self._scale(payload, module))
            case "weight_packed", "I32":
                return self._packed_integers(payload, module, self._scale(payload, module))
            case "weight", "U8" if (scale := self._find(module, "weight_scale")) and len(payload.shape) == 2:
                return self._fp4(payload, module, scale) if scale.dtype in (*_EXPONENTS, "F8_E4M3") else None
            case "weight", "I8" if scale := self._find(module, "weight_scale", "scale", "weight_scale_inv"):
                is_fp4 = scale.dtype in _EXPONENTS
                return self._fp4(payload, module, scale) if is_fp4 else self._integers(payload, module, scale)
        return None

    def _fused(self, payload: TensorSpec, name: str) -> LowBits:
        """Experts of gpt-oss, [E, N, K]: the tensor is its transpose [E, K, N], as the class of transformers has it."""
        scale = self._specs.get(f"{name}_scales")
        if scale is None:
            raise _missing(payload, "scales")
        shape = payload.shape
        if len(shape) != 4 or shape[3] != _BLOCK or scale.shape != shape[:3] or scale.dtype not in _EXPONENTS:
            raise _unfitting(payload, payload, scale)
        count, n, groups = shape[:3]
        k = groups * _GROUP
        spec = replace(payload, name=name, dtype="F4", shape=(count, k, n), strides=(1, k))
        grid = replace(scale, shape=(count, groups, n), strides=(1, groups))
        region = Granularity(f"block:{_GROUP}x1", _GROUP, 1)
        return LowBits(spec, Quantized(E2M1, region, grid, source_dtype=self._dtype))

    def _fp4(self, payload: TensorSpec, module: str, scale: TensorSpec) -> LowBits:
        if len(payload.shape) != 2:
            raise _unfitting(payload, payload, scale)
        shape = (payload.shape[0], 2 * payload.shape[1])
        spec = replace(payload, name=f"{module}.weight", dtype="F4", shape=shape)
        second, divides = None, False
        if scale.dtype == "F8_E4M3":
            region, dividing = NVFP4, self._find(module, "weight_global_scale")
            second = dividing or self._find(module, "weight_scale_2")
            divides = dividing is not None
            if second is None:
                raise _missing(payload, "second scale (`weight_scale_2` or `weight_global_scale`)")
            if second.dtype != "F32" or prod(second.shape) != 1:
                raise _unfitting(payload, spec, second)
        else:
            region = MX
        if (
            scale.dtype not in (*_EXPONENTS, "F8_E4M3")
            or not region.fits(shape)
            or scale.shape != region.scale_shape(shape)
        ):
            raise _unfitting(payload, spec, scale)
        quantized = Quantized(E2M1, region, scale, source_dtype=self._dtype, global_scale=second, divides=divides)
        return self._whole(spec, quantized, module)

    def _packed_integers(self, payload: TensorSpec, module: str, scale: TensorSpec) -> LowBits:
        n, k = self._shape(payload, module)
        fitting = [
            format
            for format in (INT4, INT8)
            if k >= 0
            and payload.shape == (n, ceil_div(k * format.bits, 32))
            and (not self._bits or format.bits in self._bits)
        ]
        if not fitting:
            raise InputError(
                f"{payload.file}: {payload.name!r} {list(payload.shape)} is neither INT4 nor INT8 of a weight {[n, k]}",
                _DECOMPRESS,
            )
        format, width = fitting[0], payload.shape[1] * 32 // fitting[0].bits
        dtype, strides = ("I4" if format == INT4 else "I8"), None if width == k else (width, 1)
        spec = replace(payload, name=f"{module}.weight", dtype=dtype, shape=(n, k), strides=strides)
        return self._whole(spec, self._affine(spec, module, scale, format), module)

    def _integers(self, payload: TensorSpec, module: str, scale: TensorSpec) -> LowBits:
        if len(payload.shape) != 2:
            raise _unfitting(payload, payload, scale)
        return self._whole(payload, self._affine(payload, module, scale, SIGNED_INT8), module)

    def _affine(self, spec: TensorSpec, module: str, scale: TensorSpec, format: TableFormat) -> Quantized:
        """Integers with a scale, and a zero point unless it is 0."""
        if scale.dtype not in _FLOATS:
            raise _unfitting(spec, spec, scale)
        region, zero_point = self._regions(spec, scale), self._find(module, "weight_zero_point")
        if zero_point is None and self._asymmetric:
            raise _missing(spec, "zero point")
        if zero_point is not None:
            rows, cols = region.scale_shape(spec.matrix)
            packed = (ceil_div(rows * format.bits, 32), cols)
            is_plain = zero_point.dtype == "I8" and prod(zero_point.shape) == rows * cols
            if not is_plain and (zero_point.dtype, zero_point.shape) != ("I32", packed):
                raise _unfitting(spec, spec, zero_point)
        return Quantized(format, region, scale, source_dtype=self._dtype, zero_point=zero_point)

    def _whole(self, spec: TensorSpec, quantized: Quantized, module: str) -> LowBits:
        """The weight, and what belongs to it: scales of FP4 activations, too, since nothing here has use for them."""
        if altered := self._find(module, *_ALTERED):
            raise InputError(f"{altered.file}: {altered.name!r} changes {spec.name!r}, which is not read", _ORIGINAL)
        others = [self._find(module, leaf) for leaf in ("weight_shape", *_INPUTS)]
        found = (quantized.global_scale, quantized.zero_point, *others)
        return LowBits(spec, quantized, tuple(tensor for tensor in found if tensor))

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        """The two numbers in every `weight_shape`: each file is opened once."""
        files: dict[str, list[TensorSpec]] = {}
        for spec in self._specs.values():
            if spec.name.endswith(".weight_shape") and spec.dtype in _SHAPES and prod(spec.shape) == 2:
                files.setdefault(spec.file, []).append(spec)
        found: dict[str, tuple[int, int]] = {}
        for file, specs in files.items():
            with closing(self._source.open_file(file)) as opened:
                for spec in specs:
                    stored = np.empty(2, _SHAPES[spec.dtype])
                    opened.readinto(stored.data.cast("B"), spec.begin)
                    found[spec.name] = (int(stored[0]), int(stored[1]))
        return found

    def _shape(self, payload: TensorSpec, module: str) -> tuple[int, int]:
        """The shape of a packed weight, which `weight_shape` holds."""
        stored = self._find(module, "weight_shape")
        if stored is None:
            raise _missing(payload, "`weight_shape`")
        if stored.dtype not in _SHAPES or prod(stored.shape) != 2:
            raise _unfitting(payload, payload, stored)
        return self._shapes[stored.name]

    def _scale(self, payload: TensorSpec, module: str) -> TensorSpec:
        found = self._find(module, "weight_scale")
        if found is None:
            raise _missing(payload, "scale")
        return found

    def _find(self, module: str, *leaves: str) -> TensorSpec | None:
        return next((found for leaf in leaves if (found := self._specs.get(f"{module}.{leaf}"))), None)


def _missing(payload: TensorSpec, what: str) -> InputError:
    return InputError(f"{payload.file}: {payload.name!r} is quantized and has no {what}", _AGAIN)


def _unfitting(payload: TensorSpec, spec: TensorSpec, other: TensorSpec) -> InputError:
    return InputError(
        f"{payload.file}: {payload.name!r} {list(spec.shape)} has {other.name!r} {other.dtype} {list(other.shape)}, "
        "which does not fit it",
        _AGAIN,
    )
