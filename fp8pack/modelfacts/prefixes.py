"""Prefixes of tensor names that a training wrapper left: torch.compile, FSDP, DataParallel."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fp8pack.errors import InputError, RecipeError
from fp8pack.modelfacts.spec import TensorSpec

# Of torch.compile and FSDP, which wrap any module; of DataParallel and DistributedDataParallel, which wrap a model.
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.")
_WRAPPED = re.compile(rf"(?:^|\.)({'|'.join(map(re.escape, _ANYWHERE))})|^(module\.)")


def wrapper_of(name: str) -> str:
    """Return the prefix that a training wrapper left in a name, empty if there is none."""
    match = _WRAPPED.search(name)
    return (match[1] or match[2]) if match else ""


def strip_prefixes(specs: Sequence[TensorSpec], prefixes: Iterable[str]) -> tuple[TensorSpec, ...]:
    """Return tensors without these prefixes of their names; those of torch.compile and FSDP go wherever they are.

    Raises:
        RecipeError: no name has a prefix. InputError: two tensors would have one name.
    """
    names = [spec.name for spec in specs]
    for prefix in prefixes:
        start = r"(^|\.)" if prefix in _ANYWHERE else "(^)"
        pattern = re.compile(start + re.escape(prefix))
        stripped = [pattern.sub(r"\1", name) for name in names]
        if stripped == names:
            raise RecipeError(f"no tensor name begins with {prefix!r}", f"leave out --strip-prefix {prefix}")
        names = stripped
    taken: dict[str, str] = {}
    for spec, name in zip(specs, names, strict=True):
        if not name or name in taken:
            raise InputError(f"{spec.file}: {spec.name!r} and {taken.get(name, '')!r} would both be named {name!r}")
        taken[name] = spec.name
    return tuple(replace(spec, name=name) for spec, name in zip(specs, names, strict=True))
