"""Kernels for schemes that vLLM has none for on a CPU without AMX: plain torch, or vLLM's own emulation.

The engine chooses among its kernels by what the machine can do; these come after all others. What is loaded, and how it
is handed to a kernel, stays the engine's.
"""

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe.experts.mxfp8_emulation_moe import Mxfp8EmulationTritonExperts
from vllm.model_executor.layers.fused_moe.oracle import mxfp8
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.platforms import PlatformEnum


class _Anywhere:
    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None


class PlainBlockKernel(_Anywhere, Fp8BlockScaledMMLinearKernel):
    """Weights [N, K] with a scale for each block, times activations as they are."""

    apply_input_quant = False

    def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
        rows, columns = self.weight_group_shape
        scales = Bs.repeat_interleave(rows, 0)[: B.shape[0]].repeat_interleave(columns, 1)[:, : B.shape[1]]
        return nn.functional.linear(A, (B.float() * scales).to(A.dtype))


class PlainWeightOnlyKernel(_Anywhere, FP8ScaledMMLinearKernel):
    """Weights [K, N] with a scale for each channel, times activations as they are."""

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = (layer.weight.float() * layer.weight_scale.flatten()).to(x.dtype)
        return nn.functional.linear(x, weight.T, bias)

    def apply_scaled_mm(self, **_: Any) -> Tensor:
        raise NotImplementedError


def _emulate_experts(backend: Fp8MoeBackend, config: Any) -> type:
    if backend is Fp8MoeBackend.EMULATION:
        return Mxfp8EmulationTritonExperts
    raise ValueError


def register() -> None:
    """Offer these kernels to the engine."""
    cpu = PlatformEnum.CPU
    linear._POSSIBLE_FP8_BLOCK_KERNELS[cpu].append(PlainBlockKernel)
    linear._POSSIBLE_WFP8A16_KERNELS[cpu].append(PlainWeightOnlyKernel)
    linear.register_linear_kernel(EmulationMxfp8LinearKernel, cpu, "mxfp8")
    mxfp8._select_kernel_cls = _emulate_experts
