"""The weights that a budget keeps: the order, what stays together, and what is refused."""

import itertools
from dataclasses import replace

import pytest

from fp8pack.errors import RecipeError
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import CHANNEL
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.planning.keep import Budget, Cost, choose_kept, parse_budget
from fp8pack.planning.plan import Action, Packing, TensorPlan

KLS = {"q_proj": 3.0, "k_proj": 2.0, "v_proj": 4.0, "o_proj": 6.0, "up_proj": 5.0, "gate_proj": 1.0, "down_proj": 8.0}


def tensor(name: str, rows: int = 100, cols: int = 10) -> TensorPlan:
    """A packed BF16 weight, with one byte of payload for each element and 4 of scales for each row."""
    spec = TensorSpec(f"{name}.weight", "BF16", (rows, cols), "f", 0, 2 * rows * cols)
    packing = Packing(E4M3, CHANNEL, ScaleRounding.NONE, Stored(f"{name}.s", "F32", (rows,)), spec.name)
    data = Stored(spec.name, "F8_E4M3", (rows, cols))
    return TensorPlan(spec, Action.PACKED, "mlp", "", data, rows, cols, packing)


def layer() -> tuple[list[TensorPlan], list[Cost]]:
    tensors = [tensor(f"l.0.{name}", 300 if name == "down_proj" else 100) for name in KLS]
    costs = [Cost((f"l.0.{name}.weight",), kl, 40 - kl) for name, kl in KLS.items()]
    return [*tensors, replace(tensor("kept"), packing=None, action=Action.COPIED)], costs


def kept(budget: str, factor: float = 1.0) -> list[str]:
    tensors, costs = layer()
    found = choose_kept(tensors, costs, parse_budget(budget), factor)
    return [name.removeprefix("l.0.").removesuffix(".weight") for name in found.kept]


QKV, GATE_UP = ["k_proj", "q_proj", "v_proj"], ["gate_proj", "up_proj"]


def test_the_frontier_goes_by_what_a_byte_gains_and_ends_at_zero() -> None:
    tensors, costs = layer()
    found = choose_kept(tensors, costs, Budget("kl", 1))
    each = 1000 - 400  # bytes that a weight of 100 x 10 takes more in BF16
    assert [(step.parts, step.nbytes - found.frontier[0].nbytes, step.kl) for step in found.frontier] == [
        (0, 0, 29.0),
        (1, each, 23.0),  # o_proj: 6 for 600 bytes
        (2, 4 * each, 14.0),  # q, k and v: 9 for 1,800
        (3, 6 * each, 8.0),  # gate and up: 6 for 1,200, as much a byte, and later by name
        (4, 9 * each, 0.0),  # down: 8 for 1,800
    ]
    assert all(a.nbytes < b.nbytes and a.kl > b.kl for a, b in itertools.pairwise(found.frontier))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("kl<=23", ["o_proj"]),
        ("kl < 22", sorted(["o_proj", *QKV])),
        ("kl<=0", sorted(KLS)),
        ("kl<=100", []),
        ("worst:1", QKV),
        ("worst:2", sorted([*QKV, "down_proj"])),
        ("worst:99", sorted(KLS)),
        ("sqnr_output>=35", sorted(["o_proj", "down_proj"])),
        ("sqnr_output>=35.5", sorted(["o_proj", "down_proj", *GATE_UP])),
        ("bytes<=1KiB", None),
    ],
)
def test_each_budget(budget: str, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(RecipeError, match="are needed with every weight packed"):
            kept(budget)
    else:
        assert kept(budget) == expected


def test_a_budget_of_bytes_is_used_and_not_exceeded() -> None:
    tensors, costs = layer()
    base = choose_kept(tensors, costs, Budget("worst", 1)).frontier[0].nbytes
    for allowed in range(0, 6000, 100):
        found = choose_kept(tensors, costs, Budget("bytes", base + allowed))
        assert found.chosen.nbytes <= base + allowed
        assert (found.chosen.parts == 0) == (allowed < 600)


def test_a_factor_makes_a_budget_of_kl_stricter() -> None:
    assert kept("kl<=23", 2.0) == sorted([*QKV, *GATE_UP, "o_proj"])


def test_experts_of_a_layer_stay_together_and_layers_are_parts_too() -> None:
    names = [f"l.{i}.mlp.experts.{e}.{leaf}" for i in range(2) for e in range(2) for leaf in ("up_proj", "down_proj")]
    tensors = [tensor(name) for name in names]
    costs = [Cost((f"{names[0]}.weight",), 5.0), Cost((f"{names[4]}.weight",), 1.0)]
    found = choose_kept(tensors, costs, Budget("worst", 1))
    assert found.kept == tuple(sorted(f"{name}.weight" for name in names[:4]))
    whole = [Cost(tuple(f"{name}.weight" for name in names), 7.0)]
    assert len(choose_kept(tensors, whole, Budget("worst", 1)).kept) == len(names)


def test_what_was_not_measured_is_no_part() -> None:
    tensors, costs = layer()
    found = choose_kept([*tensors, tensor("lm_head")], costs, Budget("worst", 99))
    assert "lm_head.weight" not in found.kept
    with pytest.raises(RecipeError, match="no weight that is packed"):
        choose_kept([tensor("lm_head")], costs, Budget("worst", 1))


@pytest.mark.parametrize(
    "text", ["", "kl", "kl>=1", "kl<=x", "bytes<=", "bytes<=1 apple", "worst:0", "worst:x", "best:1"]
)
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_budget(text)


def test_budgets_as_they_are_typed() -> None:
    assert parse_budget("kl<=1e-3") == Budget("kl", 1e-3)
    assert parse_budget("bytes<=8.5GB") == Budget("bytes", 8_500_000_000)
    assert parse_budget(" worst:8 ") == Budget("worst", 8)
    assert parse_budget("sqnr_output>=30").text == "sqnr_output>=30"
