"""What `pack --eval` does between packing and the model card: run the checkpoint and its source over a text."""

import os
from collections.abc import Callable
from pathlib import Path

from fp8pack.checkpoint.source import Source
from fp8pack.cli.output import say
from fp8pack.errors import Fp8PackError
from fp8pack.quiet import quiet_imports


def measured_section(source: Source, *, quiet: bool) -> Callable[[Path], str]:
    """Return the function that evaluates a packed directory, prints the result and returns it as Markdown.

    Raises:
        InputError: the source has no tokenizer, so that it could not be evaluated once it is packed.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # torch's threads spin, and starve all others on a shared machine
    with quiet_imports():
        from fp8pack.evaluation import evaluate, evaluate_encoder  # torch, transformers: seconds
        from fp8pack.modelrun.loader import read_tokenizer
    from fp8pack.evaluation.options import EvalOptions
    from fp8pack.report.markdown import card_section
    from fp8pack.report.progress import EVALUATING, showing_progress
    from fp8pack.report.sentences import verdict_of_encoders, verdict_of_evaluation

    read_tokenizer(source, trust_remote_code=False)
    options = EvalOptions()

    def measure(folder: Path) -> str:
        try:
            with showing_progress(EVALUATING, quiet) as on_progress:
                if evaluate_encoder.kind_of(source):
                    encoded = evaluate_encoder.run_encoders([folder], source.path, options, on_progress)
                    said, section = verdict_of_encoders(encoded), card_section(encoded)
                else:
                    found = evaluate.run_evaluation([folder], source.path, options, on_progress)
                    said, section = verdict_of_evaluation(found), card_section(found)
        except Fp8PackError as error:
            hint = "what is packed is kept; the same command without --eval finishes"
            raise type(error)(f"the evaluation failed: {error}", hint) from None
        if not quiet:
            say(*(f"cost     {line.partition(': ')[2]}" for line in said))
        return section

    return measure
