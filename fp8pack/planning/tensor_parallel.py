"""Which part of a tensor one of several GPUs holds, as Megatron cuts a model and every engine after it.

What makes heads or intermediate channels (q, k, v, gate, up) is cut along N, its bias with it; what takes them (o,
down) along K. With fewer key heads than GPUs, neighbours hold the same ones. Everything else is whole: embeddings,
logits, norms, routers, the first projections of latent attention, and the biases of o and down, which one rank adds.
"""

from dataclasses import dataclass, replace

from fp8pack.errors import InputError
from fp8pack.numerics.granularity import Granularity
from fp8pack.planning.engine_rules import REPLICATED
from fp8pack.planning.model import ModelFacts
from fp8pack.planning.policy import judge
from fp8pack.planning.spec import TensorSpec

Span = tuple[int, int]
_CONCATENATED = ("qkv_proj", "qkv", "Wqkv", "wqkv", "W_pack")  # q, then k, then v; others hold them head by head


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a matrix in one or more spans, and columns; a tensor of one dimension is rows of one column."""

    rows: tuple[Span, ...]
    cols: Span

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the part."""
        return sum(hi - lo for lo, hi in self.rows), self.cols[1] - self.cols[0]


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `world` GPUs, counted from 0."""

    rank: int
    world: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} of {self.world}")


def part_of(spec: TensorSpec, granularity: Granularity | None, facts: ModelFacts, rank: Rank) -> Part | None:
    """Return what a rank holds of a tensor, None where that is all of it.

    granularity: of an FP8 weight, None of anything else.
    Raises:
        InputError: heads, rows or columns do not spread over the ranks, or a cut would go through a region of scales.
    """
    weight = spec.name.removesuffix(".bias") + ".weight" if spec.name.endswith(".bias") else spec.name
    shape = (*spec.shape, 1) if spec.name.endswith(".bias") else spec.shape
    role = judge(replace(spec, name=weight, shape=shape, dtype="BF16"), facts).role
    region = granularity.region(shape) if granularity is not None and len(shape) == 2 else None
    if rank.world == 1 or not role.startswith(("attn", "mlp", "expert")):
        return None
    if len(shape) != 2:
        raise InputError(f"{spec.name} holds the experts of a layer in one tensor, which is not cut: load without tp")
    n, k = shape
    leaf = weight.split(".")[-2]
    if leaf in REPLICATED:
        return None
    if role.startswith("attn.o") or role.endswith(".down"):
        if spec.name.endswith(".bias"):
            return None
        cols = _cut((0, k), rank, spec, "K")
        _check(spec, region and region[1], k, [cols])
        return Part(((0, n),), cols)
    rows = [_cut(span, share, spec, "N") for span, share in _shares(spec, role, leaf, n, facts, rank)]
    _check(spec, region and region[0], n, rows)
    return Part(tuple(rows), (0, k))


def _shares(spec: TensorSpec, role: str, leaf: str, n: int, facts: ModelFacts, rank: Rank) -> list[tuple[Span, Rank]]:
    """The spans of rows that are cut each on its own, and what share of each a rank has."""
    heads, kv_heads = facts.num_heads, facts.num_kv_heads
    keys = rank
    if kv_heads and rank.world > kv_heads:
        if rank.world % kv_heads:
            raise InputError(f"{kv_heads} key heads do not spread over {rank.world} GPUs")
        keys = Rank(rank.rank * kv_heads // rank.world, kv_heads)
    if role == "attn.qkv" and leaf in _CONCATENATED:
        q, kv = heads * facts.head_dim, kv_heads * facts.head_dim
        if n != q + 2 * kv:
            raise InputError(f"{spec.name} has N = {n}, not the {q + 2 * kv} of q, k and v: load without tp")
        return [((0, q), rank), ((q, q + kv), keys), ((q + kv, n), keys)]
    if role.endswith("gate_up"):
        return [((0, n // 2), rank), ((n // 2, n), rank)]
    return [((0, n), keys if role in ("attn.k", "attn.v") else rank)]


def _cut(span: Span, rank: Rank, spec: TensorSpec, axis: str) -> Span:
    lo, hi = span
    if (hi - lo) % rank.world:
        raise InputError(f"{spec.name}: {axis} = {hi - lo} does not spread over {rank.world} GPUs")
    step = (hi - lo) // rank.world
    return lo + rank.rank * step, lo + (rank.rank + 1) * step


def _check(spec: TensorSpec, region: int | None, length: int, cuts: list[Span]) -> None:
    """Refuse a cut through a region of scales, unless one region covers all."""
    if region is None or region >= length:
        return
    if bad := next((edge for cut in cuts for edge in cut if edge % region and edge != length), None):
        raise InputError(f"{spec.name} would be cut at {bad}, within a block of {region}: load without tp")
