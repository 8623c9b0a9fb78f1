"""What a calibration says, by sites small enough to count by hand."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fp8pack.planning.calibration import (
    Calibration,
    Site,
    expert_of,
    has_converged,
    histogram_of,
    site_order,
    value_of,
    values_of,
)
from fp8pack.planning.calibration_summary import CalibrationSummary, RareExpert, summarize, summarize_site
from fp8pack.report.calibration import summary_lines


def bits(value: float) -> int:
    """Return the BF16 magnitude of a value."""
    return int(np.array(value, ml_dtypes.bfloat16).view(np.uint16)) & 0x7FFF


def site(
    histogram: Mapping[float, int],
    *points: str,
    channels: int = 1,
    tokens: int | None = None,
    history: Sequence[float] | None = None,
) -> Site:
    """Return a site of these magnitudes and how often each came; by default one prompt saw them all."""
    counts = dict(sorted(histogram.items()))
    top = max(counts, default=0.0)
    history = [top] if history is None else history
    return Site(
        points or ("a.input",),
        sum(counts.values()) // channels if tokens is None else tokens,
        np.array([bits(value) for value in counts], np.uint16),
        np.array(list(counts.values()), np.int64),
        np.full(channels, bits(top), np.uint16),
        np.full(channels, sum(value**2 * count for value, count in counts.items()) / channels),
        np.array([bits(value) for value in history], np.uint16),
    )


def facts_of(*sites: Site, all_experts: tuple[Site, ...] = ()) -> CalibrationSummary:
    prompts = tuple(f"p{i}" for i in range(sites[0].prompt_amax.size if sites else 0))
    calibration = Calibration("f", prompts, {"max_length": 8}, sites, all_experts, num_tokens=10_000)
    return summarize(calibration, output=Path("c.safetensors"))


# A site.


def test_value_of_every_magnitude_is_that_of_ml_dtypes() -> None:
    patterns = np.arange(0x7F80, dtype=np.uint16)
    expected = patterns.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(values_of(patterns), expected)
    assert [value_of(p) for p in (0, 1, 0x3F80, 0x7F7F)] == expected[[0, 1, 0x3F80, 0x7F7F]].tolist()


def test_amax_mean_square_and_percentiles_of_a_site() -> None:
    found = site({0.0: 1, 1.0: 2, 2.0: 3, 4.0: 4})
    assert (found.amax, found.mean_square) == (4.0, (2 + 12 + 64) / 10)
    expected = {0: 0.0, 1: 0.0, 10: 0.0, 10.1: 1.0, 30: 1.0, 31: 2.0, 60: 2.0, 60.5: 4.0, 99.9: 4.0, 100: 4.0}
    assert {percent: found.percentile(percent) for percent in expected} == expected


@pytest.mark.parametrize(
    ("total", "percent", "below"),
    [
        (1000, 99.9, 999),
        (2000, 99.9, 1998),
        (10_000, 99.9, 9_990),
        (1_000_000, 99.9, 999_000),
        (10_000, 99.99, 9_999),
        (1000, 99.5, 995),
        (1000, 90.0, 900),
        (1000, 0.1, 1),
    ],
)
def test_a_percentile_is_exact_where_the_share_falls_on_a_whole_count(total: int, percent: float, below: int) -> None:
    """Of 1000 magnitudes 999 are 99.9 %: the one that is larger does not count."""
    assert site({1.0: below, 100.0: total - below}).percentile(percent) == 1.0
    assert site({1.0: below - 1, 100.0: total - below + 1}).percentile(percent) == 100.0


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
def test_group_amax_is_that_of_each_group_and_of_a_short_last_one(size: int) -> None:
    values = [1.0, 5.0, 2.0, 0.5, 0.0, 8.0, 3.0, 3.0]
    found = site({8.0: 8}, channels=8)
    found.channel_amax[:] = [bits(value) for value in values]
    assert found.group_amax(size).tolist() == [max(values[i : i + size]) for i in range(0, 8, size)]


def test_a_site_without_tokens_has_no_width_and_no_spike() -> None:
    found = site({}, channels=4, history=[0.0])
    facts = summarize_site(found)
    assert (found.amax, found.percentile(99.9), found.mean_square, found.growth) == (0.0, 0.0, 0.0, 1.0)
    assert (facts.width, facts.spike, facts.channels, facts.tokens) == (None, False, 4, 0)


def test_a_site_of_zeros_has_no_width_and_no_spike() -> None:
    assert summarize_site(site({0.0: 100})).width is None
    assert not site({0.0: 100}).has_spike


def test_a_spike_is_an_amax_of_more_than_ten_times_the_99_9_percentile() -> None:
    assert not site({1.0: 9_995, 10.0: 5}).has_spike
    assert site({1.0: 9_995, 10.25: 5}).has_spike
    assert not site({1.0: 9_980, 10.25: 20}).has_spike
    assert site({0.0: 9_995, 10.0: 5}).has_spike


def test_histogram_keeps_what_was_counted() -> None:
    dense = np.zeros(1 << 15, np.int64)
    dense[[0, 5, 0x7FFF]] = [3, 2**40, 1]
    bins, counts = histogram_of(dense)
    assert (bins.dtype, bins.tolist()) == (np.uint16, [0, 5, 0x7FFF])
    assert (counts.dtype, counts.tolist()) == (np.int64, [3, 2**40, 1])


# Convergence.


@pytest.mark.parametrize(
    ("history", "growth"),
    [
        ([], 1.0),
        ([2.0], 1.0),
        ([0.0], 1.0),
        ([1.0, 2.0], 1.0),  # three quarters of two, rounded up, are both
        ([1.0, 1.0, 1.0, 2.0], 2.0),
        ([1.0, 1.0, 2.0, 1.0], 1.0),
        ([2.0, 1.0, 1.0, 1.0], 1.0),
        ([0.0, 0.0, 0.0, 1.0], math.inf),
        ([0.0, 0.0, 0.0, 0.0], 1.0),
        ([1.0, 1.0, 1.0, 1.0, 4.0], 1.0 * 4),  # the first ceil(3.75) = 4
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.5, 1.5, 3.0], 2.0),
    ],
)
def test_growth_is_that_over_the_last_quarter_of_the_prompts(history: list[float], growth: float) -> None:
    top = max(history, default=0.0)
    found = site({top: 1} if top else {}, history=history)
    assert found.growth == growth


def test_growth_of_a_calibration_is_that_of_the_site_that_grew_most() -> None:
    grown = site({3.0: 1}, "a.input", history=[1, 1, 1, 3])
    still = site({3.0: 1}, "b.input", history=[3, 1, 1, 3])
    facts = facts_of(grown, still)
    assert (facts.growth_last_quarter, facts.num_growing) == (3.0, 1)
    assert "by up to 200%" in " ".join(summary_lines(facts))
    facts = facts_of(still)
    assert (facts.growth_last_quarter, facts.num_growing) == (1.0, 0)
    assert facts_of().growth_last_quarter is None
    assert "too few prompts" in " ".join(summary_lines(facts_of()))


def test_a_site_first_reached_in_the_last_quarter_has_no_growth_that_json_could_write() -> None:
    facts = facts_of(site({3.0: 1}, history=[0, 0, 0, 3]), site({1.0: 1}, "b.input", history=[1, 1, 1, 1]))
    assert (facts.growth_last_quarter, facts.num_growing, facts.num_reached_late) == (1.0, 0, 1)
    json.dumps(facts.to_dict(), allow_nan=False)
    assert any("first reached" in line for line in summary_lines(facts))


def test_one_percent_is_no_growth_and_a_little_more_is() -> None:
    before = bits(100.0)
    assert value_of(before + 2) == 101.0
    still = site({101.0: 1}, history=[100, 100, 100, 101])
    grown = site({101.5: 1}, history=[100, 100, 100, 101.5])
    assert (facts_of(still).num_growing, facts_of(grown).num_growing) == (0, 1)


def test_converged_means_that_no_site_grew_over_the_window() -> None:
    def history(*values: float) -> np.ndarray:
        return np.array([bits(value) for value in values], np.uint16)

    assert has_converged([history(1, 1, 1)], 2)
    assert not has_converged([history(1, 1)], 2)
    assert not has_converged([history(1, 1, 2)], 2)
    assert has_converged([history(2, 1, 2)], 2)
    assert has_converged([history(100, 101, 101)], 2)
    assert not has_converged([history(100, 101, 102)], 2)
    assert not has_converged([history(2, 2, 2), history(0, 0, 1)], 2)
    assert has_converged([history(2, 2, 2), history(0, 0, 0)], 2)


# The facts of a calibration.


def test_the_widest_are_the_ten_widest_inputs_widest_first() -> None:
    sites = [site({1.0: 9_995, float(top): 5}, f"layers.{top}.input") for top in range(2, 16)]
    norms = [site({1.0: 9_995, 256.0: 5}, "norm.output")]
    widest = facts_of(*norms, *sites).widest
    assert [entry.points for entry in widest] == [(f"layers.{top}.input",) for top in range(15, 5, -1)]
    assert [entry.width for entry in widest] == [float(top) for top in range(15, 5, -1)]


def test_a_norm_whose_output_enters_a_linear_is_an_input_too() -> None:
    facts = facts_of(site({1.0: 10}, "norm.output", "q_proj.input", tokens=10))
    assert [entry.points[0] for entry in facts.widest] == ["norm.output"]
    assert any("q_proj.input" in line for line in summary_lines(facts))


def test_a_site_whose_usual_magnitude_is_zero_is_wider_than_any_other() -> None:
    """As after a squared ReLU: amax over zero has no number, and is no narrow site."""
    sites = [site({1.0: 9_995, float(top): 5}, f"layers.{top}.input") for top in range(2, 16)]
    widest = facts_of(site({0.0: 9_995, 100.0: 5}, "relu.input"), *sites).widest
    assert widest[0].points == ("relu.input",)


def test_spikes_are_named_whatever_kind_of_site_they_are() -> None:
    spiky = {1.0: 9_995, 64.0: 5}
    facts = facts_of(site(spiky, "a.input"), site({1.0: 10}, "b.input"), site(spiky, "attn.k"))
    assert facts.spikes == ("a.input", "attn.k")
    assert any(line.startswith("outliers 2 sites") for line in summary_lines(facts))


def test_rare_experts_are_those_with_fewer_than_32_routed_tokens() -> None:
    def expert(i: int, tokens: int) -> Site:
        return site({1.0: tokens} if tokens else {}, f"l.0.mlp.experts.{i}.down_proj.input", tokens=tokens)

    common = site({1.0: 5}, "l.0.mlp.down_proj.input")
    shared = site({1.0: 5}, "l.0.mlp.shared_experts.down_proj.input")
    sites = (common, shared, expert(0, 31), expert(1, 32), expert(2, 0))
    facts = facts_of(*sites)
    assert facts.rare_experts == (
        RareExpert("l.0.mlp.experts.0.down_proj.input", 31),
        RareExpert("l.0.mlp.experts.2.down_proj.input", 0),
    )
    assert not facts.has_all_experts
    assert any("--all-experts" in line for line in summary_lines(facts))
    facts = facts_of(*sites, all_experts=(expert(0, 1000),))
    assert facts.has_all_experts
    assert any("all-experts run" in line for line in summary_lines(facts))


@pytest.mark.parametrize(
    ("point", "found"),
    [
        ("l.3.mlp.experts.7.up_proj.input", ("l.3.mlp.experts", "up_proj.input")),
        ("l.3.block_sparse_moe.experts.17.w2.input", ("l.3.block_sparse_moe.experts", "w2.input")),
        ("l.3.mlp.shared_experts.up_proj.input", None),
        ("l.3.mlp.experts.up_proj.input", None),
        ("l.3.mlp.experts.7", None),
        ("experts.7.up_proj.input", None),
        ("l.3.self_attn.k", None),
    ],
)
def test_an_expert_is_told_by_its_name(point: str, found: tuple[str, str] | None) -> None:
    assert expert_of(point) == found


def test_facts_of_a_whole_calibration_are_one_json_document() -> None:
    facts = facts_of(site({1.0: 9_995, 64.0: 5}), site({}, "b.input", history=[0.0]))
    assert (facts.fingerprint, facts.options) == ("f", {"max_length": 8})
    assert (facts.num_prompts, facts.num_sites, facts.num_tokens) == (1, 2, 10_000)
    assert facts.sites == ()
    json.dumps(facts.to_dict(), allow_nan=False)
    calibration = Calibration("f", ("p",), {}, (site({1.0: 2}),))
    summary = summarize(calibration, output=Path("c.safetensors"), every_site=True)
    assert summary.sites == (summarize_site(calibration.sites[0]),)


def test_facts_of_nothing_are_told_without_numbers() -> None:
    facts = facts_of()
    assert (facts.widest, facts.num_prompts) == ((), 0)
    assert summary_lines(facts)


def test_sites_are_found_by_each_of_their_points() -> None:
    first, second = site({1.0: 1}, "a.output", "b.input"), site({2.0: 1}, "c.input")
    calibration = Calibration("", ("p",), {}, (first, second), (second,))
    assert calibration.by_point == {"a.output": first, "b.input": first, "c.input": second}
    assert calibration.all_experts_by_point == {"c.input": second}


def test_sites_stand_in_the_order_of_the_layers_whatever_their_names() -> None:
    names = ["l.10.a.input", "l.9.a.input", "l.1²2.a.input", "l.x.a.input", "a"]
    ordered = sorted((site({1.0: 1}, name) for name in names), key=site_order)
    found = [entry.points[0] for entry in ordered]
    assert found.index("l.9.a.input") < found.index("l.10.a.input")
