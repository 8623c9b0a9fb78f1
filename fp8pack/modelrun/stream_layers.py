"""One decoder layer in memory at a time: every prompt passes layer i before layer i + 1 is loaded.

Each round runs the model's own forward with a stub for every layer but one: stubs return their input. The real layer
gets the hidden states that the layer before it wrote to a file, computes, writes its own, and ends the call. So masks,
positions and other arguments come from the model itself. The last round has only stubs and runs the modules after the
layers.
"""

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp8pack.checkpoint.shard_writer import writing
from fp8pack.errors import InputError
from fp8pack.numerics.replaced_forwards import replaced_forwards

_M_MMAP_THRESHOLD = -3  # of mallopt(3)


@dataclass(frozen=True, slots=True)
class Stack:
    """The decoder layers of a model: their path, and whether they return tuples."""

    path: str
    layers: tuple[nn.Module, ...]
    returns_tuple: bool


class _Stop(BaseException):
    """Ends a call after the layer of the round; not an Exception, so that `except Exception` does not catch it."""


def find_stack(model: nn.Module, *, least_share: float = 0.0) -> tuple[str, tuple[nn.Module, ...]] | str:
    """Return path and layers of the largest ModuleList, or why none has this share of the model's parameters."""
    total = sum(parameter.numel() for parameter in model.parameters())
    stacks = [
        (sum(parameter.numel() for parameter in module.parameters()), path, tuple(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    size, path, layers = max(stacks, key=lambda stack: stack[0], default=(0, "", ()))
    if size <= least_share * total:
        return "no list of layers has most of its weights"
    return path, layers


def open_stack(
    model: nn.Module, load: Callable[[Iterable[str]], None], device: torch.device, *, least_share: float = 0.0
) -> Stack | str:
    """Load what lies outside of the layers; return the stack, or why its layers cannot be streamed.

    Memory is returned at once from then on.
    """
    found = find_stack(model, least_share=least_share)
    if isinstance(found, str):
        return found
    path, layers = found
    return_memory_at_once()
    load(name for name in model.state_dict() if not name.startswith(f"{path}."))
    ids = torch.ones((1, 4), dtype=torch.long, device=device)
    return probe(path, layers, lambda: model(input_ids=ids))


def return_memory_at_once() -> None:
    """Make glibc map every large tensor separately and unmap it when it is freed; give back what is free by now.

    Its threshold grows with freed blocks, up to 32 MiB; then layers fragment the heap, and a process with one layer at
    a time grows to the size of ten. What is free in the heap is used first, whatever the threshold, page after page: so
    call it before a model is built, which makes room for its weights in the heap that they never fill.
    """
    with suppress(AttributeError):  # another C library, without mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)


def probe(path: str, layers: tuple[nn.Module, ...], call: Callable[[], object]) -> Stack | str:
    """Run the model once without its layers; return the stack, or why its layers cannot be streamed.

    They can if each is called once, in order, with exactly the output of the one before it, without an argument that
    layers could share, and if only the last one's hidden states are used afterwards.
    """
    problem = ""
    for returns_tuple in (False, True):
        problem = _probe(layers, call, returns_tuple)
        if not problem:
            return Stack(path, layers, returns_tuple)
    return problem


def why_no_stack(stack: Stack, call: Callable[[], object]) -> str:
    """Run the model once without its layers; return why they cannot be streamed in this call, empty if they can."""
    return _probe(stack.layers, call, stack.returns_tuple)


class Rounds:
    """Runs a model layer by layer; the folder has a file of hidden states for the input of each layer."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self._stack, self._folder = stack, folder
        self._round = 0

    def hidden_path(self, index: int) -> Path:
        """Return the file of the hidden states that are the input of layer `index`."""
        return self._folder / f"hidden-{index:05}.bin"

    @contextmanager
    def round(
        self, index: int, *, taking_turns: Sequence[Path] = ()
    ) -> Iterator[Callable[[Callable[[], object]], None]]:
        """Yield a function that runs one call of the model through layer `index`; the last round is after all layers.

        Calls must have the same order in every round. taking_turns: files of hidden states of several runs, of which
        each call takes from the next.
        """
        last = index == len(self._stack.layers)
        paths = taking_turns or [self.hidden_path(index)]
        entering = [path.open("rb") for path in paths] if index else []
        target = self.hidden_path(min(index + 1, len(self._stack.layers)))
        with writing(target):
            leaving = None if last else target.open("wb")
        state = _Round(entering, leaving)
        stubs = [self._stub(layer, i, index, state) for i, layer in enumerate(self._stack.layers)]

        def take(call: Callable[[], object]) -> None:
            with suppress(_Stop):
                call()

        try:
            with replaced_forwards(zip(self._stack.layers, stubs, strict=True)):
                yield take
        finally:
            for file in entering:
                file.close()
            if leaving is not None:
                with writing(target):
                    leaving.close()

    def _stub(self, layer: nn.Module, i: int, index: int, state: "_Round") -> Callable[..., Any]:
        compute = layer.forward

        def stub(*args: Any, **kwargs: Any) -> Any:
            hidden, replace = _hidden_of(args, kwargs)
            if i == 0 and index:
                state.hidden = state.read(hidden)
            if i != index:
                return self._wrap(state.hidden)
            args, kwargs = replace(hidden if i == 0 else state.hidden)
            result = compute(*args, **kwargs)
            leaving = result[0] if isinstance(result, tuple) else result
            if (leaving.shape, leaving.dtype) != (hidden.shape, hidden.dtype):
                raise InputError(
                    f"layer {index} changes the shape or dtype of hidden states, so layers cannot be streamed",
                    "--stream-layers off",
                )
            state.write(leaving)
            raise _Stop

        return stub

    def _wrap(self, hidden: Tensor | None) -> Any:
        return (hidden,) if self._stack.returns_tuple else hidden


@dataclass(slots=True)
class _Round:
    entering: list[BufferedReader]
    leaving: BufferedWriter | None
    hidden: Tensor | None = None
    turn: int = 0

    def read(self, like: Tensor) -> Tensor:
        """The next hidden states of the file, in the shape and dtype of this call's embeddings."""
        file = self.entering[self.turn % len(self.entering)]
        self.turn += 1
        tensor = torch.empty(like.shape, dtype=like.dtype)
        view = tensor.view(-1).view(torch.uint8).numpy().data
        if file.readinto(view) != len(view):
            raise RuntimeError(f"{file.name} is truncated")
        return tensor.to(like.device)

    def write(self, hidden: Tensor) -> None:
        assert self.leaving is not None
        with writing(Path(self.leaving.name)):
            self.leaving.write(hidden.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _probe(layers: tuple[nn.Module, ...], call: Callable[[], object], returns_tuple: bool) -> str:
    """Why the layers of a model cannot be streamed, empty if they can.

    All stubs but the last return NaN, which shows every other use of their output.
    """
    order: list[int] = []
    returned: list[Tensor] = []
    problems: list[str] = []

    def stub(i: int) -> Callable[..., Any]:
        def pass_on(*args: Any, **kwargs: Any) -> Any:
            hidden, replace = _hidden_of(args, kwargs)
            told, named = replace(None)
            if returned and hidden is not returned[-1]:
                problems.append(f"hidden states are changed between layers {order[-1]} and {i}")
            elif shared := [name for name, value in named.items() if not _is_plain(value)]:
                problems.append(f"its layers share the argument {shared[0]}")
            elif not _is_plain(told):
                problems.append("its layers share an argument")
            elif _has_nan((*told, *named.values())):
                problems.append("a layer gets the hidden states of several layers")
            order.append(i)
            returned.append(torch.full_like(hidden, 0.5 if i == len(layers) - 1 else math.nan))
            return (returned[-1],) if returns_tuple else returned[-1]

        return pass_on

    with replaced_forwards((layer, stub(i)) for i, layer in enumerate(layers)):
        try:
            result = call()
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            problems.append(f"its layers return more than hidden states ({' '.join(str(error).split())[:100]})")
            result = None
    if not problems and order != list(range(len(layers))):
        problems.append("its layers are not called once each, in order")
    if not problems and _has_nan(result):
        problems.append("it uses the hidden states of more than its last layer")
    return problems[0] if problems else ""


def _has_nan(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_nan, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_nan, value))
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())


def _is_plain(value: Any) -> bool:
    """Whether a layer's argument is a value, no cache, list or dictionary that layers could share."""
    if isinstance(value, tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Any], tuple[Any, Any]]]:
    """The hidden states among a layer's arguments, and a function that replaces them."""
    if args:
        return args[0], lambda hidden: ((hidden, *args[1:]), kwargs)
    return kwargs["hidden_states"], lambda hidden: ((), {**kwargs, "hidden_states": hidden})
