"""`observe`: activation statistics of a model, recorded while it runs.

Module hooks record the input of each linear and the output of each norm. The inputs of experts, K after rotary, and V
are recorded by functions that replace transformers' experts implementation and attention (interception.py).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor, nn

from fp8pack.calibration.options import SECOND_MOMENTS, moment_options
from fp8pack.calibration.recorder import Recorder, Rows, Threads
from fp8pack.calibration.sharing import Recorders
from fp8pack.checkpoint.calibration_file import write_calibration
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import InputError
from fp8pack.inputs import parse_choice
from fp8pack.modelrun.names import Names, is_transformers_model, names_of, transformers_parts
from fp8pack.numerics.second_moments import block_of
from fp8pack.planning.calibration import INFINITY, Calibration, Site, is_gemm_input, site_order

_NOT_IDS = ("attention_mask", "position_ids", "token_type_ids", "cache_position")


def observe(
    model: nn.Module, names: Mapping[str, str | Sequence[str]] | None = None, *, second_moments: str = "none"
) -> "Observation":
    """Record the activations of a model while it runs: `with observe(model) as calibration: model(batch)`.

    Any nn.Module can be observed, in any dtype (values are rounded to BF16), on any device. Each sequence of each call
    of the model itself is a prompt: a row of [B, T] token ids, or of [B, T, K] or [B, C, H, W] values; [T, K] is one.
    Padding in an `attention_mask` is skipped. Rows that are not tokens, as of images, count for all prompts of their
    call. A tensor that is input of a module twice in a call counts once.

    names: parameters in memory -> the checkpoint's tensors, if they differ; not needed for transformers models.
    second_moments: none, or X^T X of the inputs of GEMMs, in blocks (diagonal, of 128 channels) or full, which
        compensated rounding needs.

    Raises:
        InputError: `names` has a parameter that the model does not have. RecipeError: wrong second_moments.
    """
    parse_choice("second_moments", second_moments, SECOND_MOMENTS)
    if names is not None:
        if unknown := names.keys() - model.state_dict().keys():
            raise InputError(f"the model has no parameter {min(unknown)!r}, which is in `names`")
        given = {name: [tensor] if isinstance(tensor, str) else tensor for name, tensor in names.items()}
        return Observation(model, Names(given), second_moments=second_moments)
    tensors: dict[str, tuple[str, ...]] = {name: (name,) for name in model.state_dict()}
    for path, part in transformers_parts(model):
        inside = f"{path}." if path else ""
        found = names_of(part).tensors.items()
        tensors |= {f"{inside}{name}": tuple(inside + tensor for tensor in origin) for name, origin in found}
    return Observation(model, Names(tensors), second_moments=second_moments)


@dataclass(slots=True)
class _Batch:
    """The sequences of one call: [B, T] tokens, or [B] of other inputs.

    past: tokens in the KV cache of the call, None without one.
    """

    shape: tuple[int, ...]
    prompts: list[int]
    rows: Rows
    past: int | None


class Observation:
    """Statistics of a model while it is observed; a context manager."""

    def __init__(
        self,
        model: nn.Module,
        names: Names,
        *,
        all_experts: bool = False,
        second_moments: str = "none",
        wants: Callable[[str], bool] = lambda path: True,
    ) -> None:
        """Observe the modules whose path in memory `wants` accepts."""
        self.prompts: list[str] = []
        self._repeats: dict[str, int] = {}
        self._num_tokens = 0
        self._model, self._names, self._all_experts, self.wants = model, names, all_experts, wants
        self._routed, self._unrouted = Recorders(), Recorders()
        self._batch: _Batch | None = None
        self._num_cached_tokens: Callable[[Mapping[str, Any]], int | None] = lambda kwargs: None
        self._depth = 0
        self._second_moments = second_moments
        self._undo = ExitStack()
        self._threads = Threads(1)

    def __enter__(self) -> "Observation":
        count = torch.get_num_threads()  # and half of them for short work: torch's own keep spinning for a while
        self._threads = Threads(max(1, count // 2), 1 if self._second_moments == "none" else count)
        try:
            self._attach()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
        self._routed.close()
        self._batch = None
        self._threads.close()

    def calibration(self, fingerprint: str = "", options: Mapping[str, Any] | None = None) -> Calibration:
        """Return the statistics recorded so far.

        Raises:
            InputError: an activation was NaN or infinite.
        """
        self._routed.close()
        sites = (self._sites(self._routed), self._sites(self._unrouted))
        return Calibration(fingerprint, tuple(self.prompts), dict(options or {}), *sites, num_tokens=self._num_tokens)

    def save(self, path: str | Path, model: str | Path | None = None) -> None:
        """Write the recorded statistics as a calibration file; `model` is the path of the checkpoint, if it has one.

        Raises:
            InputError: the model was not called, or an activation was NaN or infinite. SpaceError: not writable.
        """
        if not self.prompts:
            raise InputError("the model was not called while it was observed", "call it inside `with observe(model)`")
        fingerprint = open_checkpoint(Path(model)).fingerprint if model is not None else ""
        write_calibration(Path(path), self.calibration(fingerprint, moment_options(self._second_moments)))

    def restore(self, calibration: Calibration) -> None:
        """Continue from a calibration of the same model."""
        self.prompts, self._repeats = list(calibration.prompts), dict.fromkeys(calibration.prompts, 1)
        self._num_tokens = calibration.num_tokens
        self._routed.restore(calibration.sites)
        self._unrouted.restore(calibration.all_experts)

    def prompt_amax(self) -> list[NDArray[np.uint16]]:
        """Return the amax of every prompt [P], as magnitudes, for each site."""
        return [recorder.prompt_amax(len(self.prompts)) for recorder in self._routed]

    def record(self, points: Sequence[str], value: Tensor, heads: int = 1) -> None:
        """Add a tensor [..., K] to the site of these points; the channels K belong to this many heads."""

        def add(recorder: Recorder) -> None:
            recorder.heads = max(recorder.heads, heads)
            self._add(recorder, value)

        has_moments = self._second_moments != "none" and any(map(is_gemm_input, points))
        self._routed.see(points, value, add, partial(self._add_moments, value=value) if has_moments else None)

    def record_rows(self, points: Sequence[str], value: Tensor, rows: Rows, *, routed: bool) -> None:
        """Add a tensor [R, K] of these rows, which is no input of another module."""
        recorders = self._routed if routed else self._unrouted
        recorder = recorders.get(points, value.shape[-1])
        self._add_rows(recorder, value, rows)
        if routed and self._second_moments != "none":
            self._add_moments_of(recorder, value, rows)

    def expect(self, points: Sequence[str], channels: int) -> None:
        """Create a site of these points, even if nothing is recorded."""
        self._routed.get(points, channels)

    @property
    def rows(self) -> Rows:
        """The prompt of each row of the running call."""
        return self._running.rows

    @property
    def past(self) -> int | None:
        """Tokens in the KV cache of the running call, None without a cache."""
        return self._running.past

    @property
    def wants_all_experts(self) -> bool:
        """Whether every token is also run through every expert."""
        return self._all_experts

    @property
    def _running(self) -> _Batch:
        if self._batch is None:
            raise RuntimeError("a submodule of the observed model was called directly: call the model that is observed")
        return self._batch

    def _sites(self, recorders: Recorders) -> tuple[Site, ...]:
        sites = sorted((recorder.site(len(self.prompts)) for recorder in recorders), key=site_order)
        for site in sites:
            if site.bins.size and site.bins[-1] >= INFINITY:
                first = int(np.flatnonzero(site.prompt_amax >= INFINITY)[0])
                raise InputError(
                    f"{site.points[0]} is NaN or infinite in prompt {first + 1} ({self.prompts[first][:19]}…)",
                    "check that the model runs in BF16, and that the prompts suit it",
                )
        return tuple(sites)

    def _attach(self) -> None:
        parts = transformers_parts(self._model)
        callable_parts = filter(is_transformers_model, self._model.modules())  # generate() calls the encoder
        for module in dict.fromkeys((self._model, *callable_parts)):
            self._hook(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._hook(module.register_forward_hook(self._end, always_call=True))
        for path, module in self._model.named_modules():
            if not self.wants(path):
                continue
            if "norm" in type(module).__name__.lower():
                point = f"{self._names.of_linear(path)[0]}.output"
                self._hook(module.register_forward_hook(self._after_norm(point)))
            if _is_linear(module):
                points = [f"{name}.input" for name in self._names.of_linear(path)]
                self._hook(module.register_forward_pre_hook(self._before_linear(points), with_kwargs=True))
        if parts:
            from fp8pack.calibration.interception import intercept  # imports transformers
            from fp8pack.modelrun.transformers_internals import num_cached_tokens

            self._num_cached_tokens = num_cached_tokens
            paths = {module: path for path, module in self._model.named_modules()}
            for _, part in parts:
                intercept(part, self, self._names, paths, self._undo)

    def _hook(self, handle: Any) -> None:
        self._undo.callback(handle.remove)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self._model:
            self._depth = 0  # an earlier call may have raised
        self._depth += 1
        if self._depth > 1:
            return
        self._routed.close()
        tensors = {str(i): value for i, value in enumerate(args)} | kwargs
        tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor) and value.ndim}
        main = tensors.get("input_ids", next((value for name, value in tensors.items() if name not in _NOT_IDS), None))
        if main is None:
            raise ValueError("the observed model was called without a tensor, so its prompts are unknown")
        others = [value for name, value in tensors.items() if value is not main and name not in _NOT_IDS]
        main, shape = _sequences(main)
        mask = tensors.get("attention_mask")
        keep = np.ones(shape, bool)
        if mask is not None and mask.shape == shape:
            keep = mask.detach().cpu().numpy().astype(bool)
        prompts = [self._add_prompt(digest) for digest in _digests(main, keep, others)]
        rows = np.where(keep, np.array(prompts, np.int32).reshape(-1, *[1] * (len(shape) - 1)), -1)
        past = self._num_cached_tokens(kwargs)
        self._batch = _Batch(shape, prompts, Rows.of(rows.astype(np.int32).reshape(-1)), past)
        self._num_tokens += self._batch.rows.num_tokens

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._routed.close()
            self._batch = None

    def _add_prompt(self, digest: str) -> int:
        """Add a prompt; a repeated one, as in a generation loop, gets another digest."""
        repeats = self._repeats.get(digest, 0)
        self._repeats[digest] = repeats + 1
        self.prompts.append(f"blake3:{blake3(f'{digest} {repeats}'.encode()).hexdigest()}" if repeats else digest)
        return len(self.prompts) - 1

    def _before_linear(self, points: list[str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(value, Tensor) and value.is_floating_point():
                self.record(points, value)

        return hook

    def _after_norm(self, point: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor) and value.is_floating_point():
                self.record([point], value)

        return hook

    def _add(self, recorder: Recorder, value: Tensor) -> None:
        value, rows, is_spread = self._rows_of(value)
        self._add_rows(recorder, value, rows)
        if is_spread:
            recorder.spread(self._running.prompts)

    def _add_moments(self, recorder: Recorder, value: Tensor) -> None:
        value, rows, _ = self._rows_of(value)
        self._add_moments_of(recorder, value, rows)

    def _rows_of(self, value: Tensor) -> tuple[Tensor, Rows, bool]:
        """A tensor with its channels last, the prompts of its rows, and whether they count for all prompts."""
        batch = self._running
        if value.ndim == 4 and _has_heads_first(value, batch.shape):
            value = value.transpose(1, 2)
        lead, count = tuple(value.shape[:-1]), value.numel() // max(value.shape[-1], 1)
        num_rows = batch.rows.prompts.size
        if lead[: len(batch.shape)] == batch.shape or count == num_rows:  # [B, T, …, K] or [B * T, K]
            return value, batch.rows.repeat(count // max(num_rows, 1)), False
        if lead[:1] == (len(batch.prompts),):  # [B, …, K]
            return value, Rows.of(np.array(batch.prompts, np.int32).repeat(count // lead[0])), False
        return value, Rows.of(np.full(count, batch.prompts[0], np.int32)), count > 0

    def _add_rows(self, recorder: Recorder, value: Tensor, rows: Rows) -> None:
        bits, channels = _bf16(value), value.shape[-1]
        recorder.add(bits.data_ptr(), (bits.numel() // max(channels, 1), channels), rows, self._threads)

    def _add_moments_of(self, recorder: Recorder, value: Tensor, rows: Rows) -> None:
        channels = value.shape[-1]
        bits = _bf16(value).detach().view(torch.int16).reshape(-1, max(channels, 1)).numpy().view(np.uint16)
        if bits.size:
            recorder.add_moments(bits, block_of(self._second_moments, channels), rows, self._threads)


def observable(model: nn.Module, names: Names) -> set[str]:
    """Return the checkpoint's modules whose inputs are recorded, including 3-D tensors of experts."""
    from fp8pack.modelrun.transformers_internals import is_experts  # imports transformers

    seen: set[str] = set()
    for path, module in model.named_modules():
        if _is_linear(module):
            seen.update(names.of_linear(path))
        elif is_experts(module):
            inside = [name for name, _ in module.named_parameters(prefix=path, recurse=False)]
            seen.update(tensor.removesuffix(".weight") for name in inside for tensor in names.of_parameter(name))
    return seen


def _is_linear(module: nn.Module) -> bool:
    """Whether a module has a 2-D weight: nn.Linear and similar classes, no embeddings."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _sequences(main: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input of a call, one sequence per row, and its shape: [B, T], or [B] if it has no tokens."""
    if not main.is_floating_point():
        main = main.long()  # the same prompt has the same digest in every type
    for _ in range((3 if main.is_floating_point() else 2) - main.ndim):
        main = main[None]
    image = main.is_floating_point() and main.ndim > 3
    return main, tuple(main.shape[: 1 if image else 2])


def _has_heads_first(value: Tensor, batch: tuple[int, ...]) -> bool:
    """Whether a tensor is [B, heads, T, K]; with as many heads as tokens, the strides decide."""
    sequences, first, second = value.shape[:3]
    if (sequences, second) != batch:
        return False
    return first != second or value.stride(1) < value.stride(2)


def _bf16(value: Tensor) -> Tensor:
    """A tensor as contiguous BF16 on the CPU; itself, if it is."""
    if value.dtype != torch.bfloat16 or value.device.type != "cpu":
        value = value.detach().to(device="cpu", dtype=torch.bfloat16)
    return value.contiguous()


def _digests(main: Tensor, keep: NDArray[np.bool_], others: list[Tensor]) -> list[str]:
    """The digest of each sequence: of its tokens without padding, and of the other inputs of the call."""
    common = blake3()
    for tensor in others:
        common.update(_raw(tensor))
    digests = []
    for i, row in enumerate(main.detach().cpu()):
        hasher = blake3(_raw(row[torch.from_numpy(keep[i])] if keep.ndim > 1 else row))
        if others:
            hasher.update(common.digest() + i.to_bytes(8, "little"))
        digests.append(f"blake3:{hasher.hexdigest()}")
    return digests


def prompt_digest(ids: Sequence[int]) -> str:
    """Return the digest of a prompt: BLAKE3 of its token ids as little-endian int64."""
    return f"blake3:{blake3(np.array(ids, '<i8').tobytes()).hexdigest()}"


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
