"""A result as a page, and the page as a file."""

from pathlib import Path

from fp8pack.checkpoint.shard_writer import replace_file
from fp8pack.documents import Document
from fp8pack.errors import OutputError, RecipeError
from fp8pack.evaluation.encoder_evaluation import EncoderEvaluation
from fp8pack.evaluation.evaluation import Evaluation
from fp8pack.evaluation.layer_evaluation import LayerEvaluation
from fp8pack.planning.calibration_summary import CalibrationSummary
from fp8pack.reading.inspection import Inspection
from fp8pack.report.page.calibration import calibration_page
from fp8pack.report.page.encoder import encoder_page
from fp8pack.report.page.evaluation import evaluation_page
from fp8pack.report.page.inspection import inspection_page
from fp8pack.report.page.layers import layers_page

_SUFFIXES = (".html", ".htm")


def html_report(found: Document, command: str = "") -> str:
    """Return an inspection, an evaluation or the summary of a calibration as one self-contained HTML page.

    command: what made the result; it is shown at the end. The page loads nothing, and works from a disk.
    """
    if isinstance(found, Inspection):
        return inspection_page(found, command)
    if isinstance(found, Evaluation):
        return evaluation_page(found, command)
    if isinstance(found, EncoderEvaluation):
        return encoder_page(found, command)
    if isinstance(found, LayerEvaluation):
        return layers_page(found, command)
    if isinstance(found, CalibrationSummary):
        return calibration_page(found, command)
    raise TypeError(f"{type(found).__name__} has no report")


def check_page(path: Path) -> None:
    """Raise RecipeError unless a path can be that of a page: what is there is replaced."""
    if path.suffix.lower() not in _SUFFIXES:
        raise RecipeError(f"html {str(path)!r} does not end in .html", "an existing page is replaced, and nothing else")
    if path.is_dir():
        raise OutputError(f"{path} is a directory", "name a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is no directory", "make it first")


def write_page(path: Path, page: str) -> None:
    """Write a page whole: another one there is replaced at the end."""
    check_page(path)
    replace_file(path, page.encode())
