"""The verbs that write a checkpoint, for tests that make a request and options once and use them in several calls."""

from collections.abc import Callable
from pathlib import Path

from fp8pack.calibration.calibrate import run_calibration
from fp8pack.calibration.options import CalibrateOptions
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import prepare_convert, prepare_pack, prepare_unpack
from fp8pack.packing.result import PackResult
from fp8pack.packing.write import run
from fp8pack.planning.calibration_summary import CalibrationSummary
from fp8pack.planning.recipe import Request


def calibrate(model: Path, options: CalibrateOptions, **told: Callable[..., None]) -> CalibrationSummary:
    return run_calibration(model, options, **told)


def pack(
    model: Path, request: Request | None = None, options: WriteOptions | None = None, *, dry_run: bool = False
) -> PackResult:
    return run(prepare_pack(model, request or Request(), options or WriteOptions()), dry_run=dry_run)


def convert(
    checkpoint: Path, request: Request, options: WriteOptions | None = None, *, dry_run: bool = False
) -> PackResult:
    return run(prepare_convert(checkpoint, request, options or WriteOptions()), dry_run=dry_run)


def unpack(
    checkpoint: Path, dtype: str = "bfloat16", options: WriteOptions | None = None, *, dry_run: bool = False
) -> PackResult:
    return run(prepare_unpack(checkpoint, dtype, options or WriteOptions()), dry_run=dry_run)
