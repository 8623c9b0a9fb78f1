"""`observe`: statistics of what passes through a model, recorded by hooks while somebody runs it.

What enters each linear and what leaves each norm is seen by module hooks. What enters the experts of a layer, and K
after rotary and V, is not: transformers is given an experts implementation and an attention function that record and
then do what the model's own would have done.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor, nn

from fp8pack.calibrate.names import Names, is_transformers_model, names_of
from fp8pack.calibrate.recorder import Recorder, Threads
from fp8pack.checkpoint.calibration_file import write_calibration
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import InputError
from fp8pack.planning.calibration import Calibration, Site, site_order
from fp8pack.planning.policy import layer_of

_RECENT = 4  # tensors that may still enter another module: a norm's output enters q, k and v
_NOT_IDS = ("attention_mask", "position_ids", "token_type_ids", "cache_position")
_INFINITY = 0x7F80


def observe(model: nn.Module, names: Mapping[str, str | Sequence[str]] | None = None) -> "Observation":
    """Record the activations of a model while it runs: `with observe(model) as calibration: model(batch)`.

    Any nn.Module can be observed, in any dtype (values are rounded to BF16), on any device. Each sequence of each call
    of the model itself is a prompt. Padding that an `attention_mask` announces is left out.

    names: from parameters in memory to the checkpoint's tensors, where they differ; models of transformers need none.
    """
    if names is not None:
        table = Names({name: (tensor,) if isinstance(tensor, str) else tensor for name, tensor in names.items()})
    else:
        table = (
            names_of(model) if is_transformers_model(model) else Names({name: (name,) for name in model.state_dict()})
        )
    return Observation(model, table)


@dataclass(slots=True)
class _Batch:
    """The sequences of one call: [B, T] tokens, and for each row the index of its prompt, -1 for padding."""

    shape: tuple[int, ...]
    prompts: tuple[int, ...]
    rows: NDArray[np.int32]
    has_past: bool


class Observation:
    """Statistics of a model while it is observed; a context manager."""

    def __init__(
        self,
        model: nn.Module,
        names: Names,
        *,
        all_experts: bool = False,
        wants: Callable[[str], bool] = lambda path: True,
    ) -> None:
        """Observe the modules whose path in memory `wants` says yes to."""
        self.prompts: list[str] = []
        self._seen: set[str] = set()
        self._model, self._names, self._all_experts, self.wants = model, names, all_experts, wants
        self._recorders: tuple[dict[str, Recorder], dict[str, Recorder]] = ({}, {})  # routed, and all experts
        self._recent: deque[tuple[Tensor, Recorder]] = deque(maxlen=_RECENT)
        self._batch: _Batch | None = None
        self._undo: list[Callable[[], object]] = []
        self._threads = Threads(1)

    def __enter__(self) -> "Observation":
        self._threads = Threads(torch.get_num_threads())
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()

    def calibration(self, fingerprint: str = "", options: Mapping[str, Any] | None = None) -> Calibration:
        """Return what was recorded so far.

        Raises:
            InputError: a site saw a NaN or infinity.
        """
        routed, all_experts = (self._sites(recorders) for recorders in self._recorders)
        return Calibration(fingerprint, tuple(self.prompts), dict(options or {}), routed, all_experts)

    def save(self, path: str | Path, model: str | Path | None = None) -> None:
        """Write what was recorded as a calibration file; `model` is the checkpoint that ran, if it is one."""
        fingerprint = open_checkpoint(Path(model)).fingerprint if model is not None else ""
        write_calibration(Path(path), self.calibration(fingerprint))

    def restore(self, calibration: Calibration) -> None:
        """Go on where a calibration of the same model stands."""
        self.prompts, self._seen = list(calibration.prompts), set(calibration.prompts)
        for recorders, sites in zip(self._recorders, (calibration.sites, calibration.all_experts), strict=True):
            recorders.clear()
            for site in sites:
                recorder = Recorder.of_site(site)
                recorders.update(dict.fromkeys(site.points, recorder))

    def prompt_amax(self) -> list[NDArray[np.uint16]]:
        """Return the amax of every prompt [P], as magnitudes, for each site."""
        return [recorder.prompt_amax(len(self.prompts)) for recorder in _distinct(self._recorders[0])]

    def _sites(self, recorders: dict[str, Recorder]) -> tuple[Site, ...]:
        sites = sorted((recorder.site(len(self.prompts)) for recorder in _distinct(recorders)), key=site_order)
        for site in sites:
            if site.bins.size and site.bins[-1] >= _INFINITY:
                first = int(np.flatnonzero(site.prompt_amax >= _INFINITY)[0])
                raise InputError(
                    f"{site.points[0]} saw a NaN or infinity in prompt {first + 1} ({self.prompts[first][:19]}…): "
                    "the model does not run in BF16, or the prompt is not one for it"
                )
        return tuple(sites)

    def _attach(self) -> None:
        hooks = [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._end, always_call=True),
        ]
        for path, module in self._model.named_modules():
            if not self.wants(path):
                continue
            if "norm" in type(module).__name__.lower():
                point = f"{self._names.of_linear(path)[0]}.output"
                hooks.append(module.register_forward_hook(self._after_norm(point)))
            elif _is_linear(module):
                points = [f"{name}.input" for name in self._names.of_linear(path)]
                hooks.append(module.register_forward_pre_hook(self._before_linear(points), with_kwargs=True))
        self._undo += [hook.remove for hook in hooks]
        if is_transformers_model(self._model):
            from fp8pack.calibrate.doors import open_doors  # transformers, which made the model

            self._undo += open_doors(self._model, self, self._names)  # type: ignore[arg-type]

    def _detach(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._recent.clear()
        self._batch = None
        self._threads.close()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = {str(i): value for i, value in enumerate(args)} | kwargs
        tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor) and value.ndim}
        main = tensors.get("input_ids", next(iter(tensors.values()), None))
        if main is None:
            raise ValueError("the observed model was called without a tensor: nothing can be told of its prompts")
        tokens = main.shape[:2] if main.ndim > 1 else (1, *main.shape)
        mask = tensors.get("attention_mask")
        keep = np.ones(tokens, bool)
        if mask is not None and mask.shape == tokens:
            keep = mask.detach().cpu().numpy().astype(bool)
        others = [value for name, value in tensors.items() if value is not main and name not in _NOT_IDS]
        digests = _digests(main, keep, others)
        prompts = tuple(self._add_prompt(digest) for digest in digests)
        rows = np.repeat(np.array(prompts, np.int32)[:, None], keep.shape[1] if keep.ndim > 1 else 1, axis=1)
        past = kwargs.get("past_key_values")
        has_past = past is not None and past.get_seq_length() > 0
        self._batch = _Batch(tokens, prompts, np.where(keep, rows, -1).astype(np.int32).reshape(-1), has_past)
        self._recent.clear()

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._recent.clear()
        self._batch = None

    def _add_prompt(self, digest: str) -> int:
        """A prompt that comes again, as in a loop that generates, gets a digest of its own."""
        again = digest
        while again in self._seen:
            again = f"blake3:{blake3(again.encode()).hexdigest()}"
        self._seen.add(again)
        self.prompts.append(again)
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

    @property
    def rows(self) -> NDArray[np.int32]:
        """The prompt of each row of the running call, -1 for padding."""
        return self._running.rows

    @property
    def has_past(self) -> bool:
        """Whether the running call continues a sequence whose K and V are cached."""
        return self._running.has_past

    @property
    def wants_all_experts(self) -> bool:
        """Whether every token is to go through every expert as well."""
        return self._all_experts

    def record(self, points: Sequence[str], value: Tensor) -> None:
        """Add a tensor [..., K] to the site of these points; one that was just recorded elsewhere is that site's.

        Sites are not shared beyond a block, so that a run of one block at a time finds the same ones.
        """
        recorders = self._recorders[0]
        shared = next((recorder for tensor, recorder in self._recent if _is_same(tensor, value)), None)
        if shared is not None and layer_of(f"{shared.points[0]}.") == layer_of(f"{points[0]}."):
            for point in points:
                if point not in recorders:
                    recorders[point] = shared
                    shared.points.append(point)
            if all(recorders[point] is shared for point in points):
                return
        recorder = self._recorder(recorders, points, value.shape[-1])
        batch, lead = self._running, value.shape[:-1]
        if lead[: len(batch.shape)] == batch.shape:
            rows = batch.rows.repeat(value.numel() // max(value.shape[-1] * batch.rows.size, 1))
        elif len(lead) == 3 and (lead[0], lead[2]) == batch.shape:  # [B, heads, T, K]
            value, rows = value.transpose(1, 2), batch.rows.repeat(lead[1])
        elif lead.numel() == batch.rows.size:  # [B * T, K]
            rows = batch.rows
        else:  # of an image, say: rows are no tokens
            rows = np.full(lead.numel(), batch.prompts[0], np.int32)
            recorder.add(_bits(value), rows, self._threads)
            recorder.spread(batch.prompts)
            rows = rows[:0]
        if rows.size:
            recorder.add(_bits(value), rows, self._threads)
        self._recent.append((value, recorder))

    def record_rows(
        self, points: Sequence[str], value: Tensor, rows: NDArray[np.int32], *, routed: bool = True
    ) -> None:
        """Add a tensor [R, K] whose rows belong to these prompts."""
        recorders = self._recorders[0 if routed else 1]
        self._recorder(recorders, points, value.shape[-1]).add(_bits(value), rows, self._threads)

    @property
    def _running(self) -> _Batch:
        if self._batch is None:
            raise RuntimeError("a part of the observed model was called by itself: call the model that is observed")
        return self._batch

    def _recorder(self, recorders: dict[str, Recorder], points: Sequence[str], channels: int) -> Recorder:
        recorder = recorders.get(points[0]) or Recorder(points[0], channels)
        for point in points:
            if point not in recorder.points:
                recorder.points.append(point)
            recorders[point] = recorder
        return recorder


def _is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix of its own: nn.Linear, and whatever looks like it."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same values in the same place, seen in another shape perhaps."""
    if a.is_inference() or b.is_inference():
        return a is b
    return (
        a.data_ptr() == b.data_ptr()
        and a._version == b._version
        and (a.dtype, a.numel(), a.shape[-1]) == (b.dtype, b.numel(), b.shape[-1])
        and a.is_contiguous()
        and b.is_contiguous()
    )


def _bits(value: Tensor) -> NDArray[np.uint16]:
    """The BF16 bits of a tensor as [T, K]."""
    rounded = value.detach().to(device="cpu", dtype=torch.bfloat16).reshape(-1, value.shape[-1]).contiguous()
    bits: NDArray[np.uint16] = rounded.view(torch.uint16).numpy()
    return bits


def _digests(main: Tensor, keep: NDArray[np.bool_], others: list[Tensor]) -> list[str]:
    """The digest of each sequence: over its tokens, padding left out, and whatever else the call was given."""
    common = blake3()
    for tensor in others:
        common.update(_raw(tensor))
    values = main.detach().cpu()
    values = values if main.ndim > 1 else values[None]
    digests = []
    for i, row in enumerate(values):
        hasher = blake3(_raw(row[torch.from_numpy(keep[i])] if keep.ndim > 1 else row))
        if others:
            hasher.update(common.digest() + i.to_bytes(8, "little"))
        digests.append(f"blake3:{hasher.hexdigest()}")
    return digests


def prompt_digest(ids: Sequence[int]) -> str:
    """Return the digest under which a prompt of these token ids is known: that of its int64 bytes."""
    return f"blake3:{blake3(np.array(ids, '<i8').tobytes()).hexdigest()}"


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _distinct(recorders: dict[str, Recorder]) -> list[Recorder]:
    return list(dict.fromkeys(recorders.values()))
