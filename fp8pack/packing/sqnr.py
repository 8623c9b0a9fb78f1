"""What quantizing took away, from the energies of the bands: rows of a sample, for the summary and the model card."""

from collections.abc import Mapping
from dataclasses import dataclass

from fp8pack.numerics.metrics import sqnr_db
from fp8pack.packing.execute import ShardWork


@dataclass(frozen=True, slots=True)
class Measured:
    """The SQNR in dB of each weight that was quantized, and of the outputs of each that was compensated."""

    weights: Mapping[str, float]
    outputs: Mapping[str, float]


def sqnr_of(works: tuple[ShardWork, ...]) -> Measured:
    """Return the SQNR of weights and outputs, energies added up in the order of the bands of each."""
    weights, outputs = {}, {}
    for work in works:
        for tensor in work.tensors:
            found = [work.results[tensor.spec.name, index] for index in range(tensor.num_bands)]
            if (noise := sum(result.noise for result in found)) > 0:
                weights[tensor.spec.name] = sqnr_db(sum(result.signal for result in found), noise)
            if (noise := sum(result.output_noise for result in found)) > 0:
                outputs[tensor.spec.name] = sqnr_db(sum(result.output_signal for result in found), noise)
    return Measured(weights, outputs)
