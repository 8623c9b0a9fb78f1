"""The experts of a layer in FP8, where transformers 5 stores them in one 3-D parameter.

Its classes index that parameter and pass the result to torch.nn.functional.linear. FP8Experts replaces the parameter:
an index returns an ExpertWeight, which computes linear() in FP8.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fp8pack.runtime.linear import FP8Linear

_ONE_BY_ONE = "FP8 experts are indexed one at a time: call model.set_experts_implementation('eager')"


class ExpertWeight:
    """The weight of one expert, only for torch.nn.functional.linear; parts, such as gate and up, are concatenated."""

    def __init__(self, parts: Sequence[FP8Linear]) -> None:
        self.parts = parts

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Compute linear(x, weight, bias) in FP8; anything else is a TypeError."""
        if function is not nn.functional.linear:
            raise TypeError(f"the FP8 weight of an expert supports only linear(), not {function}")
        return _linear(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: ExpertWeight, bias: Tensor | None = None) -> Tensor:
    parts = [part(input) for part in weight.parts]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return out if bias is None else out + bias


class FP8Experts(nn.Module):
    """The weights of all experts of a layer: `experts[i]` is the ExpertWeight of expert i."""

    def __init__(self, experts: Sequence[Sequence[FP8Linear]]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(parts) for parts in experts)

    def __getitem__(self, index: int | Tensor) -> ExpertWeight:
        if isinstance(index, Tensor) and index.numel() != 1:
            raise ValueError(_ONE_BY_ONE)
        parts: Any = self.experts[int(index)]
        return ExpertWeight(list(parts))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(f"no {name}: {_ONE_BY_ONE}") from None

    def parts(self) -> list[list[FP8Linear]]:
        """Return the layers of each expert."""
        experts: Any = self.experts
        return [list(parts) for parts in experts]

    def __len__(self) -> int:
        return len(self.experts)
