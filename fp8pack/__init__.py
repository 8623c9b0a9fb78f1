"""Quantize BF16 checkpoints to FP8, offline, and load the result into device buffers.

The public names are resolved when they are first used, so that `import fp8pack` costs nothing. On another system than
Linux that is an Fp8PackError.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp8pack.calibration.calibrate import calibrate as calibrate
    from fp8pack.calibration.merge import merge as merge
    from fp8pack.calibration.observers import observe as observe
    from fp8pack.engines.judge import EngineVerdict as EngineVerdict
    from fp8pack.errors import BoundError as BoundError
    from fp8pack.errors import DeadlineError as DeadlineError
    from fp8pack.errors import DeviceError as DeviceError
    from fp8pack.errors import Fp8PackError as Fp8PackError
    from fp8pack.errors import InputError as InputError
    from fp8pack.errors import OutputError as OutputError
    from fp8pack.errors import RecipeError as RecipeError
    from fp8pack.errors import SpaceError as SpaceError
    from fp8pack.errors import VerificationError as VerificationError
    from fp8pack.evaluation.compare_models import compare_models as compare_models
    from fp8pack.evaluation.encoder_evaluation import EncoderEvaluation as EncoderEvaluation
    from fp8pack.evaluation.evaluate import evaluate as evaluate
    from fp8pack.evaluation.evaluate_encoder import evaluate_encoder as evaluate_encoder
    from fp8pack.evaluation.evaluate_layers import evaluate_layers as evaluate_layers
    from fp8pack.evaluation.evaluation import Evaluation as Evaluation
    from fp8pack.evaluation.layer_evaluation import LayerEvaluation as LayerEvaluation
    from fp8pack.evaluation.model_comparison import ModelComparison as ModelComparison
    from fp8pack.evaluation.recommend import recommend as recommend
    from fp8pack.evaluation.recommendation import Recommendation as Recommendation
    from fp8pack.packing.convert import convert as convert
    from fp8pack.packing.pack import pack as pack
    from fp8pack.packing.result import PackResult as PackResult
    from fp8pack.packing.unpack import unpack as unpack
    from fp8pack.planning.calibration_summary import CalibrationSummary as CalibrationSummary
    from fp8pack.reading.comparison import Comparison as Comparison
    from fp8pack.reading.diff import diff as diff
    from fp8pack.reading.inspect import inspect as inspect
    from fp8pack.reading.inspect import inspect_calibration as inspect_calibration
    from fp8pack.reading.inspection import Inspection as Inspection
    from fp8pack.reading.inspection import TensorInspection as TensorInspection
    from fp8pack.reading.predict import OutputPredictions as OutputPredictions
    from fp8pack.reading.predict import predict_outputs as predict_outputs
    from fp8pack.reading.tensor_detail import TensorDetail as TensorDetail
    from fp8pack.reading.tensor_detail import inspect_tensor as inspect_tensor
    from fp8pack.reading.verification import Verification as Verification
    from fp8pack.reading.verify import verify as verify
    from fp8pack.report.markdown import markdown_report as markdown_report
    from fp8pack.report.page.write import html_report as html_report
    from fp8pack.runtime.environment import Environment as Environment
    from fp8pack.runtime.environment import environment as environment
    from fp8pack.runtime.linear import FP8Linear as FP8Linear
    from fp8pack.runtime.linear import linear as linear
    from fp8pack.runtime.load import load_packed as load_packed
    from fp8pack.runtime.model import load_model as load_model
    from fp8pack.runtime.packed_checkpoint import PackedCheckpoint as PackedCheckpoint
    from fp8pack.runtime.packed_tensor import PackedTensor as PackedTensor
    from fp8pack.runtime.report_fp8 import FP8Report as FP8Report
    from fp8pack.runtime.report_fp8 import report_fp8 as report_fp8

__version__ = "0.1.0"

_HOMES = {
    "fp8pack.calibration.calibrate": "calibrate",
    "fp8pack.calibration.merge": "merge",
    "fp8pack.calibration.observers": "observe",
    "fp8pack.engines.judge": "EngineVerdict",
    "fp8pack.errors": "BoundError DeadlineError DeviceError Fp8PackError InputError OutputError RecipeError SpaceError "
    "VerificationError",
    "fp8pack.evaluation.compare_models": "compare_models",
    "fp8pack.evaluation.encoder_evaluation": "EncoderEvaluation",
    "fp8pack.evaluation.evaluate": "evaluate",
    "fp8pack.evaluation.evaluate_encoder": "evaluate_encoder",
    "fp8pack.evaluation.evaluation": "Evaluation",
    "fp8pack.evaluation.evaluate_layers": "evaluate_layers",
    "fp8pack.evaluation.layer_evaluation": "LayerEvaluation",
    "fp8pack.evaluation.model_comparison": "ModelComparison",
    "fp8pack.evaluation.recommend": "recommend",
    "fp8pack.evaluation.recommendation": "Recommendation",
    "fp8pack.packing.convert": "convert",
    "fp8pack.packing.pack": "pack",
    "fp8pack.packing.result": "PackResult",
    "fp8pack.packing.unpack": "unpack",
    "fp8pack.planning.calibration_summary": "CalibrationSummary",
    "fp8pack.reading.comparison": "Comparison",
    "fp8pack.reading.diff": "diff",
    "fp8pack.reading.inspect": "inspect inspect_calibration",
    "fp8pack.reading.inspection": "Inspection TensorInspection",
    "fp8pack.reading.predict": "OutputPredictions predict_outputs",
    "fp8pack.reading.tensor_detail": "TensorDetail inspect_tensor",
    "fp8pack.reading.verification": "Verification",
    "fp8pack.reading.verify": "verify",
    "fp8pack.report.markdown": "markdown_report",
    "fp8pack.report.page.write": "html_report",
    "fp8pack.runtime.environment": "Environment environment",
    "fp8pack.runtime.linear": "FP8Linear linear",
    "fp8pack.runtime.load": "load_packed",
    "fp8pack.runtime.model": "load_model",
    "fp8pack.runtime.packed_checkpoint": "PackedCheckpoint",
    "fp8pack.runtime.packed_tensor": "PackedTensor",
    "fp8pack.runtime.report_fp8": "FP8Report report_fp8",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604


if not TYPE_CHECKING:  # a checker knows the names above, and no others

    def __getattr__(name):
        if name in _HOME:
            if _HOME[name] != "fp8pack.errors":
                import_module("fp8pack.machine").check_system()
            with import_module("fp8pack.quiet").quiet_imports():
                return getattr(import_module(_HOME[name]), name)
        raise AttributeError(f"module 'fp8pack' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
