"""The result of `compare_models`."""

from dataclasses import dataclass

from fp8pack.documents import Document, html_table
from fp8pack.errors import NoSuchName


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """The outputs of a module of both models: calls, SQNR of B's in dB, None where one is a NaN or infinity, cosine."""

    name: str
    kind: str
    calls: int
    sqnr: float | None
    cosine: float | None


@dataclass(frozen=True, slots=True, repr=False)
class ModelComparison(Document):
    """Two models on the same batches, module by module, in the order of their first calls; `""` is the whole model."""

    num_batches: int
    modules: tuple[ModuleComparison, ...]

    def __getitem__(self, name: str) -> ModuleComparison:
        """Return a module by its name."""
        for module in self.modules:
            if module.name == name:
                return module
        raise NoSuchName(name, [module.name for module in self.modules])

    def _repr_html_(self) -> str:
        rows = [
            (
                module.name or "(model)",
                module.kind,
                str(module.calls),
                "NaN" if module.sqnr is None else f"{module.sqnr:.2f}",
            )
            for module in self.modules
        ]
        return html_table(f"{self.num_batches} batches", ("module", "kind", "calls", "SQNR dB"), rows)
