"""Tensor parallelism: which shard of a tensor each GPU gets, as Megatron splits a model and every engine after it.

Column-parallel weights (q, k, v, gate, up) are sharded along N, with their biases; row-parallel ones (o, down) along K.
With fewer key heads than GPUs, key heads are replicated. Everything else is replicated: embeddings, logits, norms,
routers, the first projections of latent attention, and the biases of o and down, which one rank adds. Only known
layouts are sharded: any other linear of a block is refused, since a cut through a head gives wrong numbers and no
error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fp8pack.errors import InputError
from fp8pack.modelfacts.fused import REPLICATED, fused_module
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.roles import UNKNOWN_LINEAR, judge
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.numerics.granularity import Granularity

Packed = Sequence[tuple[TensorSpec, str]]  # FP8 weights [N, K] and their roles
GEMM_MULTIPLE = 16  # cuBLASLt and CUTLASS FP8 kernels want N and K in multiples of 16
Span = tuple[int, int]
_WHOLE = "load without tp"
_HEADS = ("q_proj", "q_b_proj", "kv_b_proj", "wq", "query")  # rows by heads
_KEYS = ("k_proj", "v_proj", "wk", "wv", "key", "value")  # rows by key heads
_CHANNELS = ("gate_proj", "up_proj", "w1", "w3", "fc1", "c_fc", "wi", "wi_0", "wi_1")  # rows by intermediate channels
_TAKES_HEADS = ("o_proj", "wo", "out_proj")
_TAKES_CHANNELS = ("down_proj", "w2", "fc2", "c_proj")
_CONCATENATED = {"qkv_proj": (), "W_pack": (), "Wqkv": ("dbrx",)}  # q, then k, then v: of these models, of all if empty
_BY_HEAD = ("gpt_neox", "bloom")  # query_key_value is q, k and v of one head after the other
_DENSE = ("bert", "roberta", "gpt_neox", "bloom", "phi")  # name them dense, in the MLP or after attention
_ELSEWHERE = ("linear_attn", "mixer", "mamba", "single_blocks", "single_transformer_blocks", "conv")


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
    """Return the shard of a tensor on a rank, None if it is replicated.

    granularity: of an FP8 weight, None of anything else.
    Raises:
        InputError: heads, rows or columns are not divisible by the ranks, a cut would split a scale region, or the head
            layout of a linear is unknown.
    """
    weight = spec.name.removesuffix(".bias") + ".weight" if spec.name.endswith(".bias") else spec.name
    shape = (*spec.shape, 1) if spec.name.endswith(".bias") else spec.shape
    role = judge(replace(spec, name=weight, shape=shape, dtype="BF16"), facts).role
    if rank.world == 1:
        return None
    if _is_by_head(spec, facts):
        raise _unknown(spec)
    if not role.startswith(("attn", "mlp", "expert", "ssm", UNKNOWN_LINEAR)):
        return None
    if len(shape) != 2:
        raise InputError(f"{spec.name} has all experts of a layer in one tensor, which cannot be sharded", _WHOLE)
    n, k = shape
    leaf, kind = weight.split(".")[-2], _axis(weight, role, facts)
    if leaf in REPLICATED:
        return None
    if role.startswith("attn"):
        _check_heads(facts, rank)
    region = granularity.region(shape) if granularity is not None else None
    match kind:
        case "K":
            if spec.name.endswith(".bias"):
                return None
            cols = _cut((0, k), rank, spec, "K")
            _check(spec, region and region[1], k, [cols])
            return Part(((0, n),), cols)
        case "N":
            rows = [_cut(span, share, spec, "N") for span, share in _shares(spec, leaf, n, facts, rank)]
            _check(spec, region and region[0], n, rows)
            return Part(tuple(rows), (0, k))
        case _:
            raise _unknown(spec)


def _axis(weight: str, role: str, facts: ModelFacts) -> str:
    """The axis that a weight is sharded along; empty if its layout is unknown."""
    *path, leaf, _ = weight.split(".")
    if any(part in _ELSEWHERE for part in path):
        return ""
    if leaf == "dense" and facts.model_type in _DENSE:
        return "K" if role.startswith("attn.o") or role.endswith("down") else "N" if role.endswith("up") else ""
    if leaf in ("dense_h_to_4h", "dense_4h_to_h", "query_key_value") and facts.model_type in _BY_HEAD:
        return "K" if leaf == "dense_4h_to_h" else "N"
    if leaf in _TAKES_HEADS and role.startswith("attn.o"):
        return "K"
    if leaf in _TAKES_CHANNELS and role.endswith(".down"):
        return "K"
    models = _CONCATENATED.get(leaf)
    is_fused = leaf == "gate_up_proj" or (models is not None and (not models or facts.model_type in models))
    return "N" if is_fused or leaf in (*_HEADS, *_KEYS, *_CHANNELS) else ""


def _is_by_head(spec: TensorSpec, facts: ModelFacts) -> bool:
    """Whether a small tensor has one element per head, or per channel of all heads."""
    widths = {heads * facts.head_dim for heads in (facts.num_heads, facts.num_kv_heads)} - {facts.head_dim, 0}
    of_heads = bool(re.search(r"\.[qk]_norm\.weight$", spec.name)) and spec.shape[:1] in {(width,) for width in widths}
    return of_heads or spec.name.endswith(".sinks")


def _unknown(spec: TensorSpec) -> InputError:
    return InputError(f"{spec.name} has an unknown head or channel layout, which cannot be sharded", _WHOLE)


def _check_heads(facts: ModelFacts, rank: Rank) -> None:
    heads, keys = facts.num_heads, facts.num_kv_heads
    if not heads:
        raise InputError("config.json has no number of attention heads", _WHOLE)
    if heads % rank.world or (keys % rank.world and rank.world % keys):
        raise InputError(f"{heads} heads with {keys} key heads cannot be sharded over {rank.world} GPUs", _WHOLE)


def _shares(spec: TensorSpec, leaf: str, n: int, facts: ModelFacts, rank: Rank) -> list[tuple[Span, Rank]]:
    """The spans of rows that are sharded separately, and the rank within each."""
    heads, kv_heads = facts.num_heads, facts.num_kv_heads
    keys = Rank(rank.rank * kv_heads // rank.world, kv_heads) if 0 < kv_heads < rank.world else rank
    if leaf in _CONCATENATED:
        q, kv = heads * facts.head_dim, kv_heads * facts.head_dim
        if n != q + 2 * kv:
            raise InputError(f"{spec.name} has N = {n}, not the {q + 2 * kv} of q, k and v", _WHOLE)
        return [((0, q), rank), ((q, q + kv), keys), ((q + kv, n), keys)]
    if leaf == "gate_up_proj":
        return [((0, n // 2), rank), ((n // 2, n), rank)]
    return [((0, n), keys if leaf in _KEYS else rank)]


def _cut(span: Span, rank: Rank, spec: TensorSpec, axis: str) -> Span:
    lo, hi = span
    if (hi - lo) % rank.world:
        raise InputError(f"{spec.name} has {axis} = {hi - lo}, not divisible by {rank.world} GPUs", _WHOLE)
    step = (hi - lo) // rank.world
    return lo + rank.rank * step, lo + (rank.rank + 1) * step


def _check(spec: TensorSpec, region: int | None, length: int, cuts: list[Span]) -> None:
    """Refuse a cut through a scale region, unless one region covers all."""
    if region is None or region >= length:
        return
    if bad := next((edge for cut in cuts for edge in cut if edge % region and edge != length), None):
        raise InputError(f"{spec.name} would be cut at {bad}, within a scale block of {region}", _WHOLE)


def tp_problem(packed: Packed, granularity: Granularity, tp: int, facts: ModelFacts, ep: int = 1) -> str | None:
    """Return the first weight whose shard on one of `tp` GPUs would cut a scale region, as text.

    ep: groups of GPUs among which experts are divided; each expert is sharded over the tp / ep GPUs of its group.
    q/k/v, gate/up are sharded along N, o and down along K; with fewer key heads than GPUs, k and v are replicated, and
    the first projections of latent attention always.
    """
    heads, kv_heads = facts.num_heads, facts.num_kv_heads
    if heads % tp or (kv_heads and kv_heads % tp and tp % kv_heads):
        return f"{heads} attention heads with {kv_heads} key heads do not spread over {tp} GPUs"
    if tp % ep:
        return f"{tp} GPUs do not divide into {ep} groups of experts"
    if tp == 1:
        return None  # nothing is sharded
    rows = granularity.rows if granularity.rows and granularity.rows > 1 else GEMM_MULTIPLE
    cols = max(granularity.cols or GEMM_MULTIPLE, GEMM_MULTIPLE)
    for spec, role in packed:
        n, k = spec.shape
        parts = tp // ep if role.startswith("expert") else tp
        if parts == 1:
            continue
        if role in ("attn.k", "attn.v") and kv_heads and facts.head_dim:
            parts = min(tp, kv_heads)
        if role.startswith("attn.o") or role.endswith(".down"):
            if k % parts or (k // parts) % cols:
                return f"{spec.name} has K = {k}, and {k} / {parts} is not a multiple of {cols}"
        elif not (n % parts or (n // parts) % rows) or spec.name.split(".")[-2] in REPLICATED:
            continue
        elif fused_module(spec.name) or role.startswith(("attn", "mlp", "expert")):
            return f"{spec.name} has N = {n}, and {n} / {parts} is not a multiple of {rows}"
    return None
