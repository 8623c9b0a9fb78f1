"""ComfyUI's single files: nothing in config.json, a marker tensor beside each weight or one for the file.

comfyui         `<weight>_scale` F32 [], `<module>.input_scale` F32 [], `<module>.comfy_quant` U8: JSON as text
                mx: `<weight>_scale` U8 [N', K'/32] in tiles (numerics/swizzle.py)
comfyui-scaled  the older one: `<module>.scale_weight` F32 [], `<module>.scale_input`, `scaled_fp8` for the file
"""

import json
from typing import Any

from fp8pack.checkpoint.quant_methods.convention import Convention
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import MX, TENSOR, Granularity
from fp8pack.numerics.swizzle import padded
from fp8pack.planning.layout import Constant
from fp8pack.planning.plan import PackPlan

_PREFIX = "model.diffusion_model."  # of the diffusion model in an all-in-one file


class ComfyUi(Convention):
    """The convention that ComfyUI reads since 2025."""

    name = "comfyui"
    holds_mixed = True

    def expresses(self, storage: Storage) -> bool:
        """Return whether it is tensor scales in either format, or e4m3 with mx scales."""
        mx = storage.granularity == MX and storage.powers_of_two and storage.format == E4M3
        return storage.granularity == TENSOR or (mx and storage.activations != "static")

    def problem(self, shape: tuple[int, ...], granularity: Granularity) -> str | None:
        """Return why a weight stays: ComfyUI's kernels pad mx to multiples of 32, which a file must hold already."""
        if granularity == MX and (shape[0] % 32 or shape[1] % 32):
            return f"{shape[0]} x {shape[1]} is not a multiple of 32"
        return super().problem(shape, granularity)

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale`, in tiles for mx."""
        grid = super().scale(spec, granularity)
        if granularity != MX:
            return grid
        rows, cols = granularity.scale_shape(spec.shape)
        return Stored(grid.name, grid.dtype, padded((rows, cols)))

    def is_tiled(self, granularity: Granularity) -> bool:
        """Return whether they are mx scales."""
        return granularity == MX

    def markers(self, spec: TensorSpec, storage: Storage, *, is_first: bool) -> tuple[Constant, ...]:
        """Return `comfy_quant`."""
        layer: dict[str, Any] = {
            "format": "mxfp8" if storage.granularity == MX else storage.format.torch_dtype,
            **({"full_precision_matrix_mult": True} if storage.activations == "none" else {}),
        }
        data = json.dumps(layer).encode()
        return (Constant(Stored(f"{spec.name.removesuffix('.weight')}.comfy_quant", "U8", (len(data),)), data),)

    def config(self, plan: PackPlan) -> None:
        """Return nothing: the files speak for themselves."""


class ComfyUiScaled(Convention):
    """The older convention, which earlier versions and other programs read."""

    name = "comfyui-scaled"

    def expresses(self, storage: Storage) -> bool:
        """Return whether it is e4m3 with tensor scales."""
        return storage.format == E4M3 and storage.granularity == TENSOR

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `scale_weight` []."""
        return self.grid(f"{spec.name.removesuffix('.weight')}.scale_weight", spec, granularity)

    def input_scale(self, name: str) -> Stored:
        """Return `scale_input` []."""
        return Stored(f"{name.removesuffix('.weight')}.scale_input", "F32", ())

    def markers(self, spec: TensorSpec, storage: Storage, *, is_first: bool) -> tuple[Constant, ...]:
        """Return `scaled_fp8` once: two elements ask for products in full precision."""
        if not is_first:
            return ()
        prefix = _PREFIX if spec.name.startswith(_PREFIX) else ""
        count = 2 if storage.activations == "none" else 0
        return (Constant(Stored(f"{prefix}scaled_fp8", "F8_E4M3", (count,)), bytes(count)),)

    def config(self, plan: PackPlan) -> None:
        """Return nothing: the file speaks for itself."""
