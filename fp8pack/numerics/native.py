"""The CPU kernels as machine code: compiled once on a machine, then loaded in a hundredth of a second.

Importing Numba and reviving its own cache takes a quarter of a second of every run; so kernel_cache.py keeps the
object file, under a name that changes with the kernels, the compiler and the processor.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Final, Literal

import llvmlite
import llvmlite.binding as llvm
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.kernel_cache import read_code, write_code
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.numerics.tiles import LANES, TILE
from fp8pack.numerics.value_table import value_table
from fp8pack.units import ceil_div

Array = NDArray[Any]
Bits = Literal["uint16", "uint32"]
Module = Literal[
    "uint16",
    "uint32",
    "observe",
    "compare-uint16",
    "compare-uint32",
    "moments",
    "compensate-uint16",
    "compensate-uint32",
    "scale-errors-uint16",
    "scale-errors-uint32",
]

_KIND: Final = {"BF16": 0, "F16": 1, "F32": 2}
_BITS: Final[dict[str, Bits]] = {"BF16": "uint16", "F16": "uint16", "F32": "uint32"}
_SIGN_MASK: Final = {"BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF}
_INFINITY: Final = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
_ROUNDING: Final = {ScaleRounding.NONE: 0, ScaleRounding.UP: 1, ScaleRounding.FLOOR: 2}
_U8, _U16, _U32, _F32 = np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.float32)
_F64 = np.dtype(np.float64)
_DTYPES: Final[dict[Bits, np.dtype[Any]]] = {"uint16": _U16, "uint32": _U32}
_WEIGHT_KERNELS = ("quantize", "amax", "dequantize", "largest_codes")
_KERNELS: Final[dict[Module, tuple[str, ...]]] = {
    **dict.fromkeys(_DTYPES, _WEIGHT_KERNELS),
    "observe": ("observe",),
    "compare-uint16": ("compare",),
    "compare-uint32": ("compare",),
    "moments": ("add_moments", "factor"),
    "compensate-uint16": ("compensate",),
    "compensate-uint32": ("compensate",),
    "scale-errors-uint16": ("scale_errors",),
    "scale-errors-uint32": ("scale_errors",),
}
_SOURCES = ("kernels.py", "compensation_kernels.py", "scale_kernels.py", "tiles.py")
_CHUNK = 2048  # elements that `compare` widens at a time
_BEYOND = 1 + 2.0**-8  # a weight that is larger than the largest value by more than a BF16 rounding was clipped

_P, _F, _I, _U, _B = ctypes.c_void_p, ctypes.c_float, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint8
_SIGNATURES: Final = {
    "quantize": (_F, *[_P] * 6, *[_I] * 5, _U, _U, _F, _I, _U, _U, _U, _I, _I),
    "amax": (_F, _P, _P, _I, _I, _I, _U, _U),
    "dequantize": (_F, *[_P] * 4, *[_I] * 9, _U, _F, _U),
    "largest_codes": (None, _P, _P, *[_I] * 8),
    "observe": (_I, *[_P] * 6, *[_I] * 5),
    "compare": (None, *[_P] * 6, *[_I] * 3, _B, _B, _F),
    "add_moments": (None, *[_P] * 4, *[_I] * 6),
    "factor": (_I, _P, _P, _I),
    "compensate": (None, *[_P] * 7, *[_I] * 8, _F, *[_U] * 3),
    "scale_errors": (None, *[_P] * 6, *[_I] * 6, _F, *[_U] * 3),
}


def quantize_rows(  # noqa: PLR0913
    weight: Array,
    payload: Array,
    scales: Array,
    *,
    dtype: str,
    region: tuple[int, int],
    format: Float8Format,
    rounding: ScaleRounding | None,
) -> float:
    """Write the payload and the scales of whole rows of regions; return amax, NaN if a weight is not finite.

    Shapes: weight [N, K], the raw bits of `dtype` (uint16 for BF16 and F16, uint32 for F32); payload [N, K] uint8;
        scales [ceil(N/R), ceil(K/C)] float32, where region = (R, C); all contiguous.
    rounding: None reads the scales instead of computing them.
    The bytes of a region with a NaN or infinity mean nothing.

    The encoder adds to |q| a power of two 23 - mantissa_bits binades above it, so that the float32 adder rounds to
    the FP8 grid, half to even. The low bits of the sum, plus the exponent moved to its FP8 place, plus a constant,
    are the code; the constant is even and small, so it rides in the low bits of the addend.
    """
    (n, k), bits, (rows, cols) = weight.shape, _BITS[dtype], region
    smallest, addend, shift = _encoder(format)
    scratch = np.empty((3, k), np.uint32)
    first = address_of(scratch, _U32, 3 * k, written=True)
    return float(
        _kernels(bits).call["quantize"](
            address_of(weight, _DTYPES[bits], n * k),
            address_of(payload, _U8, n * k, written=True),
            address_of(scales, _F32, ceil_div(n, rows) * ceil_div(k, cols), written=rounding is not None),
            *(first, first + 4 * k, first + 8 * k),
            *(n, k, *region, _KIND[dtype], _SIGN_MASK[dtype], _INFINITY[dtype]),
            *(format.max, format.emax, smallest, addend, shift),
            *(0 if rounding is None else _ROUNDING[rounding], int(rounding is None)),
        )
    )


def _encoder(format: Float8Format) -> tuple[int, int, int]:
    """The constants of the encoder: float32 bits of the smallest normal number, the addend, the shift."""
    shift = 23 - format.mantissa_bits
    constant = -((128 - format.bias) << format.mantissa_bits) & 0xFF
    return (128 - format.bias) << 23, (shift << 23) | constant, shift


def amax_rows(weight: Array, *, dtype: str) -> float:
    """Return the largest magnitude of weight [N, K] (raw bits of `dtype`); NaN if it holds a NaN or infinity."""
    n, k = weight.shape
    bits = _BITS[dtype]
    scratch = np.empty(k, weight.dtype)
    places = (address_of(weight, _DTYPES[bits], n * k), address_of(scratch, _DTYPES[bits], k, written=True))
    limits = (_KIND[dtype], _SIGN_MASK[dtype], _INFINITY[dtype])
    return float(_kernels(bits).call["amax"](*places, n, k, *limits))


def dequantize_rows(
    payload: NDArray[np.uint8],
    scales: NDArray[np.float32],
    weight: Array,
    *,
    region: tuple[int, int],
    format: Float8Format,
    offset: tuple[int, int] = (0, 0),
) -> float:
    """Write payload * scale into a weight; return its amax, NaN if the payload holds a NaN or infinity.

    Shapes: payload [N, K] uint8; scales, float32, of the regions that these rows and columns lie in, where
        region = (R, C) and offset is the place of the first element in the first region; weight [N, K]: uint16 takes
        BF16 bits, uint32 float32 bits. All contiguous.
    The product is taken in float32 and rounded once, to nearest even. amax is that of the float32 products.
    """
    n, k = payload.shape
    bits: Bits = "uint16" if weight.dtype.itemsize == 2 else "uint32"
    largest = format.nan_codes[0] - 1
    scratch = np.empty(k, np.float32)
    _check_grid(scales.shape, payload.shape, region, offset)
    return float(
        _kernels(bits).call["dequantize"](
            address_of(payload, _U8, n * k),
            address_of(scales, _F32, scales.size),
            address_of(weight, _DTYPES[bits], n * k, written=True),
            address_of(scratch, _F32, k, written=True),
            *(n, k, *scales.shape, *region, *offset, _KIND["BF16" if bits == "uint16" else "F32"]),
            *(23 - format.mantissa_bits, 2.0 ** (127 - format.bias), largest),
        )
    )


def largest_codes(
    payload: NDArray[np.uint8], grid: tuple[int, int], *, region: tuple[int, int], offset: tuple[int, int] = (0, 0)
) -> NDArray[np.uint8]:
    """Return the largest byte of each region of a payload, without its sign: FP8 magnitudes sort as their bytes do.

    Shapes: payload [N, K] uint8; the result has the shape `grid`, of the regions that these rows and columns lie in, as
        in `dequantize_rows`.
    """
    largest = np.zeros(grid, np.uint8)
    _check_grid(grid, payload.shape, region, offset)
    places = (address_of(payload, _U8, payload.size), address_of(largest, _U8, largest.size, written=True))
    _kernels("uint16").call["largest_codes"](*places, *payload.shape, *grid, *region, *offset)
    return largest


def load_observer() -> Callable[..., int]:
    """Return the C function that adds activations to statistics in one pass; it lets go of the GIL.

    Called with the addresses of values [T, K], raw BF16 bits, uint16; prompts [T] int32, which prompt a row belongs to,
    -1 for padding; channel_amax [K] uint16 (magnitude bits); channel_squares [K] float64; histogram [32768] int64;
    prompt_amax [P] uint16 (magnitude bits), all contiguous; then T, K, P, and the columns from begin to end.
    It returns the smallest magnitude above zero that came by (65536 if none did) << 32, and the largest.
    Calls with columns that do not overlap may run at once, given a histogram and a prompt_amax of their own.
    """
    return _kernels("observe").call["observe"]


def compare_rows(  # noqa: PLR0913
    exact: Array,
    approximate: NDArray[np.float32],
    codes: NDArray[np.uint8] | None,
    sums: NDArray[np.float64],
    counts: NDArray[np.int64],
    *,
    dtype: str,
    format: Float8Format,
) -> None:
    """Add to sums and counts how far approximate values are from exact ones.

    exact: raw bits of `dtype` (BF16, F16, F32); approximate: float32, as many; codes: the FP8 bytes behind them, if
    there are any. sums [6] float64: the energies of exact, of approximate and of their difference; the relative
    errors |difference| / |exact| where exact is not zero, and the largest of them; the largest |exact|. counts [5]:
    exact values other than zero, NaNs and infinities of either, values that became zero, subnormal codes, values
    clipped to the largest.
    """
    bits, n = _BITS[dtype], exact.size
    scratch = np.empty(_CHUNK, np.float32)
    codes = np.zeros(n, np.uint8) if codes is None else codes
    _kernels("compare-uint16" if bits == "uint16" else "compare-uint32").call["compare"](
        address_of(exact, _DTYPES[bits], n),
        address_of(approximate, _F32, n),
        address_of(codes, _U8, n),
        address_of(scratch, _F32, _CHUNK, written=True),
        address_of(sums, np.dtype(np.float64), 6, written=True),
        address_of(counts, np.dtype(np.int64), 5, written=True),
        *(n, _CHUNK, _KIND[dtype], 1 << format.mantissa_bits, format.nan_codes[0] - 1, _BEYOND),
    )


def add_moments(
    values: NDArray[np.uint16],
    prompts: NDArray[np.int32],
    moments: NDArray[np.float64],
    rows: tuple[int, int] | None = None,
) -> None:
    """Add X^T X of activations to their second moments, in float64, token after token.

    Shapes: values [T, K], raw BF16 bits; prompts [T], negative for padding, which is left out; moments [B, S, S], of
        blocks of S channels, of which the last may be narrower. Their upper triangles count.
    rows: those of moments [B * S, S] to add to; calls for other rows may run at once.
    """
    (n, k), (blocks, size, _) = values.shape, moments.shape
    if prompts.size != n or blocks != ceil_div(k, size):
        raise ValueError(f"{blocks} blocks of {size} channels and {prompts.size} prompts are none of {n} x {k}")
    scratch = np.empty(size * TILE)
    _kernels("moments").call["add_moments"](
        address_of(values, _U16, n * k),
        address_of(prompts, np.dtype(np.int32), n),
        address_of(moments, _F64, blocks * size * size, written=True),
        address_of(scratch, _F64, scratch.size, written=True),
        *(n, k, blocks, size, *(rows or (0, blocks * size))),
    )


def factor(matrix: NDArray[np.float64]) -> bool:
    """Replace the upper triangle of H [S, S] by R, upper triangular, with R R^T = H; False if H has no such factor."""
    size = matrix.shape[0]
    panel = np.empty((LANES, size))
    places = (address_of(matrix, _F64, size * size, written=True), address_of(panel, _F64, panel.size, written=True))
    return bool(_kernels("moments").call["factor"](*places, size))


def compensate_rows(  # noqa: PLR0913
    weight: Array,
    payload: Array,
    scales: NDArray[np.float32],
    gains: NDArray[np.float64],
    order: NDArray[np.int64],
    *,
    dtype: str,
    region: tuple[int, int],
    format: Float8Format,
    again: bool = False,
) -> None:
    """Write the payload of rows of a weight, rounded with feedback, for scales that are given.

    Shapes: weight, payload and scales as in `quantize_rows`; gains [B, S, S] float64 and order [B, S] int64, a
        permutation of the channels of each block, as compensation.py makes them.
    again: the payload is rounded already; every column is rounded once more, given all others.
    """
    (n, k), bits, (rows, cols), (blocks, size, _) = weight.shape, _BITS[dtype], region, gains.shape
    if blocks != ceil_div(k, size):
        raise ValueError(f"{blocks} blocks of {size} channels are none of {k}")
    if order.shape != (blocks, size) or (np.sort(order) != np.arange(size)).any():
        raise ValueError("the order of a block is no permutation of its channels")
    scratch, values = np.empty(4 * size * LANES), value_table(format)  # kept while the kernel runs
    _kernels("compensate-uint16" if bits == "uint16" else "compensate-uint32").call["compensate"](
        address_of(weight, _DTYPES[bits], n * k),
        address_of(payload, _U8, n * k, written=True),
        address_of(scales, _F32, ceil_div(n, rows) * ceil_div(k, cols)),
        address_of(gains, _F64, gains.size),
        address_of(order, np.dtype(np.int64), blocks * size),
        address_of(values, _F32, 256),
        address_of(scratch, _F64, scratch.size, written=True),
        *(n, k, blocks, size, rows, cols, _KIND[dtype], int(again), format.max, *_encoder(format)),
    )


def add_scale_errors(  # noqa: PLR0913
    weight: Array,
    scales: NDArray[np.float32],
    errors: NDArray[np.float64],
    *,
    factors: NDArray[np.float32],
    dtype: str,
    region: tuple[int, int],
    format: Float8Format,
) -> None:
    """Add to errors what rounding to nearest costs each region with each of the candidates scale * factor.

    Shapes: weight and scales as in `quantize_rows`; factors [F]; errors [ceil(N/R), ceil(K/C), F] float64, the squares
        of differences, added row after row. The differences are taken in float32.
    """
    (n, k), bits, (rows, cols), count = weight.shape, _BITS[dtype], region, factors.size
    steps, values = np.empty(count, np.float32), value_table(format)  # kept while the kernel runs
    grid = ceil_div(n, rows) * ceil_div(k, cols)
    _kernels("scale-errors-uint16" if bits == "uint16" else "scale-errors-uint32").call["scale_errors"](
        address_of(weight, _DTYPES[bits], n * k),
        address_of(scales, _F32, grid),
        address_of(errors, _F64, grid * count, written=True),
        address_of(values, _F32, 256),
        address_of(factors, _F32, count),
        address_of(steps, _F32, count, written=True),
        *(n, k, rows, cols, _KIND[dtype], count, format.max, *_encoder(format)),
    )


class _Kernels:
    """The C functions of a module, and the engine that owns their code."""

    def __init__(self, machine_code: bytes, machine: llvm.TargetMachine, names: tuple[str, ...]) -> None:
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
        self._engine.finalize_object()
        self.call = {name: self._function(name, *_SIGNATURES[name]) for name in names}

    def _function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        address = self._engine.get_function_address(f"fp8pack_{name}")
        return ctypes.CFUNCTYPE(result, *arguments)(address)  # ctypes lets go of the GIL during the call


_loading = Lock()


def _kernels(module: Module) -> _Kernels:
    with _loading:  # two threads that both loaded would each free the code that the other is running
        return _load(module)


@cache
def _load(module: Module) -> _Kernels:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="pic", codemodel="jitdefault", jit=True
    )
    key = blake3(b"".join(Path(__file__).with_name(name).read_bytes() for name in _SOURCES))
    key.update(repr((module, cpu, features, llvmlite.__version__)).encode())
    name = f"kernels-{key.hexdigest(16)}.o"
    machine_code = read_code(name)
    if machine_code is None:
        machine_code = machine.emit_object(llvm.parse_assembly(_compile(module)))
        write_code(name, machine_code)
    return _Kernels(machine_code, machine, _KERNELS[module])


def _compile(module: Module) -> str:
    from fp8pack.numerics import compensation_kernels, kernels, scale_kernels  # imports Numba, for compiling only

    if module == "moments":
        return compensation_kernels.compile_moments()
    if module == "compensate-uint16" or module == "compensate-uint32":  # noqa: PLR1714
        return compensation_kernels.compile_compensation("uint16" if module == "compensate-uint16" else "uint32")
    if module == "scale-errors-uint16" or module == "scale-errors-uint32":  # noqa: PLR1714
        return scale_kernels.compile_scale_errors("uint16" if module == "scale-errors-uint16" else "uint32")
    if module == "observe":
        return kernels.compile_observer()
    if module == "uint16" or module == "uint32":  # noqa: PLR1714  (mypy narrows this, not `in`)
        return kernels.compile_kernels(module)
    return kernels.compile_comparison("uint16" if module == "compare-uint16" else "uint32")


def address_of(array: Array, dtype: np.dtype[Any], size: int, *, written: bool = False) -> int:
    """Return where the elements of an array lie, for a kernel; the caller keeps the array while the kernel runs.

    Raises:
        ValueError: it has another dtype or size, gaps between its elements, or is read-only although it is written.
    """
    flags = array.flags
    is_writable = flags.writeable
    if array.dtype != dtype or array.size != size or not flags.c_contiguous or (written and not is_writable):
        state = ("contiguous" if flags.c_contiguous else "with gaps", "" if is_writable else ", read-only")
        raise ValueError(
            f"a kernel takes {size} {dtype} without gaps{', writable' if written else ''}; "
            f"this is {array.dtype} {list(array.shape)}, {state[0]}{state[1]}"
        )
    if is_writable and size:
        buffer: Any = array
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))  # a third of the time of array.ctypes.data
    return int(array.ctypes.data)


def _check_grid(
    grid: tuple[int, ...], shape: tuple[int, ...], region: tuple[int, int], offset: tuple[int, int]
) -> None:
    """Raise ValueError unless a grid has a cell for every region that rows and columns lie in."""
    (n, k), (rows, cols), (top, left) = shape, region, offset
    if len(grid) != 2 or grid[0] * rows < n + top or grid[1] * cols < k + left:
        raise ValueError(f"{list(grid)} regions of {rows} x {cols} do not hold {n} x {k} from {top}, {left} on")
