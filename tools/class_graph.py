"""Classes of a source tree, as far as parsing shows them: what they build, what they inherit, where a name is from."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple


class Origin(NamedTuple):
    """A class or a value: the module that defines it, and its name there."""

    module: str
    name: str


@dataclass(frozen=True)
class Linear:
    """A linear layer that a class builds: its name, its class, and whether it is given the quantization config.

    quantized: None where parsing does not tell. parts: how many outputs it is merged of, as its code lists them.
    """

    leaf: str
    kind: str
    quantized: bool | None
    parts: int = 1


class Module:
    """A parsed file: its classes, its values, and where its imported names are from."""

    def __init__(self, name: str, text: str, *, is_package: bool) -> None:
        self.name, self._text = name, text
        self._package = name if is_package else name.rpartition(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        """The file as parsed."""
        return ast.parse(self._text)

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        """Classes at the top of the file."""
        return {node.name: node for node in _statements(self.tree.body) if isinstance(node, ast.ClassDef)}

    @cached_property
    def values(self) -> dict[str, ast.expr]:
        """What is assigned to names at the top of the file; the last assignment counts."""
        return dict(_assigned(self.tree.body))

    @cached_property
    def imports(self) -> dict[str, Origin]:
        """Imported names; of a module itself, an origin without a name."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                module = self._absolute(node.module, node.level)
                found |= {alias.asname or alias.name: Origin(module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.asname or alias.name: Origin(alias.name, "") for alias in node.names}
        return found

    def _absolute(self, module: str | None, level: int) -> str:
        if level == 0:
            return module or ""
        parts = self._package.split(".")
        parts = parts[: len(parts) - level + 1]
        return ".".join([*parts, *([module] if module else [])])


class Graph:
    """The modules of a tree, and what their classes build."""

    def __init__(self, texts: dict[str, str]) -> None:
        """texts: of each file, by the name of its module; one with modules below it is a package."""
        packages = {name.rpartition(".")[0] for name in texts}
        self.modules = {name: Module(name, text, is_package=name in packages) for name, text in texts.items()}
        self._named: dict[Origin, tuple[Origin, ...]] = {}

    def origin(self, module: str, name: str) -> Origin:
        """Return where a name in a module is defined, followed through imports."""
        seen = set()
        here = Origin(module, name)
        while here not in seen:
            seen.add(here)
            found = self.modules.get(here.module)
            if found is None or here.name in found.classes or here.name in found.values:
                return here
            if here.name in found.imports:
                here = found.imports[here.name]
            elif f"{here.module}.{here.name}" in self.modules:
                return Origin(f"{here.module}.{here.name}", "")
        return here

    def find(self, origin: Origin) -> ast.ClassDef | None:
        """Return a class that is defined in the tree."""
        module = self.modules.get(origin.module)
        return module.classes.get(origin.name) if module else None

    def lineage(self, origin: Origin) -> tuple[Origin, ...]:
        """Return a class and its bases that are in the tree, nearest first."""
        node = self.find(origin)
        if node is None:
            return ()
        found = [origin]
        for base in node.bases:
            if (name := dotted(base)) is not None:
                found += [each for each in self.lineage(self._dotted_origin(origin.module, name)) if each not in found]
        return tuple(found)

    def attribute(self, origin: Origin, name: str) -> ast.expr | None:
        """Return what a class, or the nearest base that does, assigns to an attribute."""
        for each in self.lineage(origin):
            node = self.find(each)
            if node and name in (values := dict(_assigned(node.body))):
                return values[name]
        return None

    def reachable(self, origin: Origin) -> tuple[Origin, ...]:
        """Return the classes of the tree that a class names in its code, its bases' too, and those that they name."""
        found: dict[Origin, None] = {}
        waiting = [origin]
        while waiting:
            here = waiting.pop()
            if here in found or self.find(here) is None:
                continue
            found[here] = None
            if here not in self._named:
                self._named[here] = tuple(self._named_in(here))
            waiting += self._named[here]
        return tuple(found)

    def _named_in(self, origin: Origin) -> Iterator[Origin]:
        """The classes that a class names, also by way of a table at the top of a file."""
        node = self.find(origin)
        for name in _names(node) if node else ():
            found = self._dotted_origin(origin.module, name)
            module = self.modules.get(found.module)
            if module is not None and (value := module.values.get(found.name)) is not None:
                origins = [self._dotted_origin(found.module, each) for each in _names(value)]
            else:
                origins = [found]
            yield from (each for each in origins if each != origin and self.find(each) is not None)

    def _dotted_origin(self, module: str, name: str) -> Origin:
        head, _, rest = name.partition(".")
        origin = self.origin(module, head)
        return self.origin(origin.module, rest) if rest and not origin.name and "." not in rest else origin

    def linears(self, origin: Origin, kinds: frozenset[str]) -> Iterator[Linear]:
        """Yield the linear layers that a class builds itself; kinds: the names of their classes."""
        node = self.find(origin)
        for statement in ast.walk(node) if node else ():
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                leaf = next((t.attr for t in targets if isinstance(t, ast.Attribute)), "")
                for call in ast.walk(statement.value):
                    if isinstance(call, ast.Call) and (kind := self._kind(origin, call)) in kinds:
                        yield Linear(_prefix_leaf(call) or leaf, kind, _is_quantized(call), _count_parts(call))

    def fused(self, origin: Origin) -> dict[str, list[str]]:
        """Return the fused linears of a class and their parts: of `packed_modules_mapping`, and of its loading code."""
        node, found = self.find(origin), {}
        for name, value in _assigned(node.body) if node else ():
            if name == "packed_modules_mapping":
                found |= {key: parts for key, parts in partial_dict(value).items() if isinstance(parts, list)}
        rows: dict[str, list[str]] = {}
        for statement in ast.walk(node) if node else ():
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.List):
                name = dotted(statement.targets[0]) or ""
                for entry in statement.value.elts if name.endswith("mapping") else ():
                    match literal(entry):
                        case (str(whole), str(part), _) if part not in rows.get(whole, ()):
                            rows.setdefault(whole.strip("."), []).append(part.strip("."))
        return {**{key: parts for key, parts in rows.items() if len(parts) > 1}, **found}

    def names(self, origin: Origin) -> set[str]:
        """Return every name and attribute in the code of a class."""
        node = self.find(origin)
        return set(_names(node)) if node else set()

    def _kind(self, origin: Origin, call: ast.Call) -> str:
        name = dotted(call.func)
        return self._dotted_origin(origin.module, name).name if name else ""


def _names(node: ast.AST) -> list[str]:
    found = {dotted(child) for child in ast.walk(node) if isinstance(child, ast.Name | ast.Attribute)}
    return sorted(filter(None, found))


def dotted(node: ast.expr) -> str | None:
    """Return `a.b` of a name or attribute, None of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return None


def literal(node: ast.expr | None) -> Any:
    """Return the value of a literal, None of anything else."""
    try:
        return None if node is None else ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def partial_dict(node: ast.expr | None) -> dict[Any, Any]:
    """Return the literal entries of a dictionary; those that are computed are passed over."""
    if not isinstance(node, ast.Dict):
        return {}
    pairs = ((literal(key), literal(value)) for key, value in zip(node.keys, node.values, strict=True))
    return {key: value for key, value in pairs if key is not None and value is not None}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at the top of a file, those under `if` and `try` too."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try):
                yield from _statements(getattr(node, inner, []))


def _assigned(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in _statements(body):
        if isinstance(node, ast.Assign):
            yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value


def _prefix_leaf(call: ast.Call) -> str:
    """The last part of a literal prefix: `prefix=f"{prefix}.gate"` is gate."""
    for keyword in call.keywords:
        if keyword.arg == "prefix":
            for part in ast.walk(keyword.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.strip("."):
                    leaf = part.value.rpartition(".")[2]
                    return leaf if leaf.isidentifier() else ""
    return ""


def _count_parts(call: ast.Call) -> int:
    """The length of the list of output sizes; 1 where it is not written in the call."""
    sizes = [keyword.value for keyword in call.keywords if keyword.arg == "output_sizes"] or call.args[1:2]
    match sizes:
        case [ast.List(elts=elements)]:
            return len(elements)
        case [ast.BinOp(left=ast.List(elts=elements), op=ast.Mult(), right=ast.Constant(value=int(times)))]:
            return len(elements) * times
    return 1


def _is_quantized(call: ast.Call) -> bool | None:
    """Whether a call is given a quantization config: one by name; None if that depends on more."""
    given = next((keyword.value for keyword in call.keywords if keyword.arg == "quant_config"), None)
    if given is None:
        if any(keyword.arg is None for keyword in call.keywords):
            return None  # **kwargs
        return any((dotted(argument) or "").endswith("quant_config") for argument in call.args)
    if isinstance(given, ast.Constant) and given.value is None:
        return False
    if isinstance(given, ast.Call):  # a configuration made of the one that is given
        return any((dotted(argument) or "").endswith("quant_config") for argument in given.args) or None
    return True if (dotted(given) or "").endswith("quant_config") else None
