"""The kernel that records activations, against NumPy; how threads share its work; what follows from a site."""

import math
import threading
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fp8pack.calibration.recorder import Recorder, Rows, Threads
from fp8pack.numerics.native import load_observer
from fp8pack.planning.calibration import Site, has_converged, value_of

Statistics = tuple[NDArray[np.uint16], NDArray[np.float64], NDArray[np.int64], NDArray[np.uint16]]


def observe_rows(values: Any, prompts: Any, statistics: tuple[Any, Any, Any, Any], columns: tuple[int, int]) -> int:
    """The kernel over whole arrays."""
    places = [array.ctypes.data for array in (values, prompts, *statistics)]
    return load_observer()(*places, *values.shape, statistics[3].size, *columns)


def placed(values: Any) -> tuple[int, tuple[int, int]]:
    """Where an array lies, and its shape; the caller keeps it alive."""
    KEPT.append(values)
    return values.ctypes.data, values.shape


KEPT: list[Any] = []


def empty(channels: int, prompts: int) -> Statistics:
    return (
        np.zeros(channels, np.uint16),
        np.zeros(channels, np.float64),
        np.zeros(1 << 15, np.int64),
        np.zeros(prompts, np.uint16),
    )


def by_numpy(values: NDArray[np.uint16], prompts: NDArray[np.int32], before: Statistics) -> Statistics:
    """What the kernel must leave: `before`, and the rows that belong to a prompt."""
    amax, squares, histogram, prompt_amax = (array.copy() for array in before)
    kept, rows = values[prompts >= 0], prompts[prompts >= 0]
    magnitudes = kept & 0x7FFF
    with np.errstate(invalid="ignore"):
        numbers = kept.view(ml_dtypes.bfloat16).astype(np.float64)
        squares = np.add.accumulate(np.concatenate([squares[None], numbers**2]))[-1]  # row after row, as it must be
    np.add.at(histogram, magnitudes.reshape(-1), 1)
    if len(kept):
        amax = np.maximum(amax, magnitudes.max(axis=0))
        np.maximum.at(prompt_amax, rows, magnitudes.max(axis=1, initial=0))
    return amax, squares, histogram, prompt_amax


def check(found: Any, expected: Any) -> None:
    for name, a, b in zip(("amax", "squares", "histogram", "prompt amax"), found, expected, strict=True):
        np.testing.assert_array_equal(a, b, name)
        assert a.dtype == b.dtype


def finite_bits(shape: tuple[int, int], seed: int) -> NDArray[np.uint16]:
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.integers(-40, 40, shape)).astype(np.float32)
    return (rng.standard_normal(shape, dtype=np.float32) * spread).astype(ml_dtypes.bfloat16).view(np.uint16)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 300), (300, 1), (7, 13), (33, 127), (64, 64), (5, 1025), (0, 9)], ids=str
)
def test_every_statistic_equals_that_of_numpy(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(shape))
    statistics = empty(shape[1], 5)
    for call in range(3):  # each adds to what is there
        values = finite_bits(shape, call)
        prompts = rng.integers(-1, 5, shape[0]).astype(np.int32)
        expected = by_numpy(values, prompts, statistics)
        observe_rows(values, prompts, statistics, (0, shape[1]))
        check(statistics, expected)


def test_every_pattern_of_16_bits_is_counted_under_its_magnitude() -> None:
    """Also NaN and infinities: who reads the histogram finds them at its end."""
    patterns = np.arange(65536, dtype=np.uint16)
    for shape in ((256, 256), (1, 65536), (65536, 1)):
        values = patterns.reshape(shape)
        prompts = np.zeros(shape[0], np.int32)
        statistics = empty(shape[1], 1)
        observe_rows(values, prompts, statistics, (0, shape[1]))
        check(statistics, by_numpy(values, prompts, empty(shape[1], 1)))
        assert (statistics[2] == 2).all()
        assert statistics[3].tolist() == [0x7FFF]


def test_rows_of_no_prompt_leave_no_trace() -> None:
    values = np.full((4, 6), 0x7FC0, np.uint16)
    statistics = empty(6, 2)
    observe_rows(values, np.full(4, -1, np.int32), statistics, (0, 6))
    check(statistics, empty(6, 2))


def test_columns_are_all_that_is_touched() -> None:
    values, prompts = finite_bits((9, 50), 3), np.array([0, 1, -1, 1, 0, 2, 2, -1, 1], np.int32)
    amax, squares, histogram, prompt_amax = empty(50, 3)
    peaks = []
    for columns in ((0, 0), (0, 17), (17, 18), (18, 50), (50, 50)):
        part = np.zeros(3, np.uint16)
        observe_rows(values, prompts, (amax, squares, histogram, part), columns)
        peaks.append(part)
        assert not amax[columns[1] :].any()
    prompt_amax = np.max(peaks, axis=0)
    check((amax, squares, histogram, prompt_amax), by_numpy(values, prompts, empty(50, 3)))
    np.testing.assert_array_equal(peaks[1], by_numpy(values[:, :17], prompts, empty(17, 3))[3])


def test_counts_go_beyond_32_bits() -> None:
    statistics = empty(4, 1)
    statistics[2][[0, 0x3F80]] = 2**32 - 2, 2**53
    observe_rows(np.array([[0, 0x8000, 0, 0xBF80]], np.uint16), np.zeros(1, np.int32), statistics, (0, 4))
    assert statistics[2][[0, 0x3F80]].tolist() == [2**32 + 1, 2**53 + 1]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=st.integers(0, 9), columns=st.integers(1, 40), prompts=st.integers(1, 4))
def test_any_bits_in_any_shape(data: st.DataObject, rows: int, columns: int, prompts: int) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1 << 16, (rows, columns)).astype(np.uint16)
    owners = rng.integers(-1, prompts, rows).astype(np.int32)
    statistics = empty(columns, prompts)
    observe_rows(values, owners, statistics, (0, columns))
    check(statistics, by_numpy(values, owners, empty(columns, prompts)))


def check_sites(a: Site, b: Site) -> None:
    assert (a.points, a.tokens) == (b.points, b.tokens)
    for name in ("bins", "counts", "channel_amax", "channel_squares", "prompt_amax"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
        assert getattr(a, name).dtype == getattr(b, name).dtype


@pytest.mark.parametrize("count", [2, 3, 5])
def test_threads_change_nothing(count: int) -> None:
    """Shapes on both sides of where work is split, and with fewer columns than threads."""
    for shape in ((300, 1031), (70000, 4), (1 << 18, 1), (1, 1 << 18), (3, 5)):
        one, several = Recorder("a", shape[1]), Recorder("a", shape[1])
        alone, together = Threads(1), Threads(count)
        for call in range(2):
            values = finite_bits(shape, call)
            prompts = np.random.default_rng(call).integers(-1, 90 * (call + 1), shape[0]).astype(np.int32)
            one.add(*placed(values), Rows.of(prompts), alone)
            several.add(*placed(values), Rows.of(prompts), together)
        together.close()
        check_sites(one.site(200), several.site(200))


def test_a_recorder_equals_numpy_and_goes_on_from_its_site() -> None:
    threads, whole, first = Threads(1), Recorder("a", 7), Recorder("a", 7)
    values, prompts = finite_bits((200, 7), 1), np.repeat(np.arange(100, dtype=np.int32), 2)
    prompts[::9] = -1
    whole.add(*placed(values), Rows.of(prompts), threads)
    first.add(*placed(values[:90]), Rows.of(prompts[:90]), threads)
    kept = first.site(50)
    later = Recorder.of_site(kept)
    later.add(*placed(values[90:]), Rows.of(prompts[90:]), threads)
    check_sites(whole.site(120), later.site(120))
    check_sites(kept, first.site(50))  # a site is no view of what goes on
    amax, squares, histogram, prompt_amax = by_numpy(values, prompts, empty(7, 120))
    bins = np.flatnonzero(histogram).astype(np.uint16)
    tokens = int((prompts >= 0).sum())
    check_sites(whole.site(120), Site(("a",), tokens, bins, histogram[bins], amax, squares, prompt_amax))
    with pytest.raises(ValueError, match="a had 7 channels, now 8"):
        whole.add(*placed(finite_bits((1, 8), 0)), Rows.of(np.zeros(1, np.int32)), threads)


@pytest.mark.parametrize("prompts", [[3], [3, 5], (3, 5), (0, 1, 2)])
def test_prompts_whose_rows_cannot_be_told_apart_have_one_amax(prompts: Any) -> None:
    recorder = Recorder("a", 2)
    recorder.add(
        *placed(np.array([[0x4000, 0x3F80]], np.uint16)), Rows.of(np.array([prompts[0]], np.int32)), Threads(1)
    )
    recorder.spread(prompts)
    expected = np.zeros(70, np.uint16)
    expected[list(prompts)] = 0x4000
    np.testing.assert_array_equal(recorder.site(70).prompt_amax, expected)


def site_of(values: NDArray[np.uint16], prompts: NDArray[np.int32] | None = None) -> Site:
    recorder = Recorder("a", values.shape[1])
    prompts = np.zeros(len(values), np.int32) if prompts is None else prompts
    recorder.add(*placed(values), Rows.of(prompts), Threads(1))
    return recorder.site(int(prompts.max(initial=-1)) + 1)


def numbers_of(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    return np.abs(values.view(ml_dtypes.bfloat16).astype(np.float32))


PERCENTS = ("0", "0.1", "1", "7", "14", "28", "29", "50", "55", "56", "57", "58", "90", "99", "99.9", "99.99", "100")


@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (10, 100), (7, 30), (100, 100), (3, 333)], ids=str)
def test_a_percentile_is_that_of_all_values_sorted(shape: tuple[int, int]) -> None:
    """The smallest value that so many of 100 do not exceed; `percent` as it is written in decimals."""
    distinct = np.random.default_rng(shape[1]).permutation(30000)[: shape[0] * shape[1]].reshape(shape)
    for values in (distinct.astype(np.uint16), finite_bits(shape, 5)):
        site, ordered = site_of(values), np.sort(numbers_of(values), axis=None)
        for percent in PERCENTS:
            rank = max(1, math.ceil(Fraction(percent) * ordered.size / 100))
            assert site.percentile(float(percent)) == ordered[rank - 1], percent
        assert site.percentile(100) == site.amax == ordered[-1]


@settings(max_examples=200, deadline=None)
@given(counts=st.lists(st.integers(1, 2**50), min_size=1, max_size=8), percent=st.integers(0, 100))
def test_a_percentile_of_many_values_is_exact(counts: list[int], percent: int) -> None:
    bins = np.arange(len(counts), dtype=np.uint16) * 100
    nothing = np.zeros(1, np.uint16)
    site = Site(("a",), sum(counts), bins, np.array(counts, np.int64), nothing, np.zeros(1), nothing)
    seen = 0
    for magnitude, count in zip(bins, counts, strict=True):
        seen += count
        if seen * 100 >= percent * sum(counts):
            assert site.percentile(percent) == value_of(int(magnitude))
            break


@pytest.mark.parametrize("size", [1, 3, 16, 64, 99, 100, 101])
def test_the_amax_of_groups_of_channels(size: int) -> None:
    values = finite_bits((9, 100), size)
    numbers = numbers_of(values)
    expected = [numbers[:, begin : begin + size].max() for begin in range(0, 100, size)]
    found = site_of(values).group_amax(size)
    assert found.dtype == np.float32
    assert found.tolist() == expected


def test_mean_square_spike_and_growth() -> None:
    values = finite_bits((40, 25), 8)
    site = site_of(values)
    exact = sum(Fraction(float(number)) ** 2 for number in numbers_of(values).flat) / values.size
    assert site.mean_square == pytest.approx(float(exact), rel=1e-15)
    assert site.channel_squares.sum() / values.size == pytest.approx(float(exact), rel=1e-12)
    assert site.amax == numbers_of(values).max()

    plain = np.full((20, 100), 0x3F80, np.uint16)  # 1.0
    spiky = plain.copy()
    spiky[3, 4] = 0x4130  # 11.0
    assert (site_of(plain).has_spike, site_of(spiky).has_spike) == (False, True)
    assert site_of(np.full((20, 5), 0x3F80, np.uint16)).growth == 1.0
    prompts = np.arange(8, dtype=np.int32)
    rising = np.full((8, 1), 0x3F80, np.uint16)
    rising[6] = 0x4000  # 2.0 in the last quarter
    assert site_of(rising, prompts).growth == 2.0
    assert site_of(rising[::-1].copy(), prompts).growth == 1.0
    assert site_of(np.where(rising == 0x4000, rising, 0).astype(np.uint16), prompts).growth == math.inf


def test_a_site_that_nothing_reached() -> None:
    site = Recorder("a", 4).site(3)
    assert (site.tokens, site.amax, site.mean_square, site.percentile(99.9), site.growth) == (0, 0.0, 0.0, 0.0, 1.0)
    assert not site.has_spike
    assert site.group_amax(3).tolist() == [0.0, 0.0]


def test_converged_is_one_percent_over_the_window() -> None:
    one, more = 0x3F80, 0x3F82  # 1.0 and 1.015625
    flat = np.full(6, one, np.uint16)
    grown = np.array([one] * 5 + [more], np.uint16)
    assert has_converged([flat], 3)
    assert not has_converged([flat, grown], 3)
    assert has_converged([np.array([more] + [one] * 5, np.uint16)], 5)
    assert has_converged([np.array([one] * 5 + [one + 1], np.uint16)], 3)  # 0.8 %
    assert not has_converged([flat], 6)
    assert not has_converged([np.array([0, 0, 0, one], np.uint16)], 2)


def test_an_interrupt_waits_for_the_threads_that_hold_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is broken off may free its arrays: nobody may write to them later."""
    threads, recorder, values = Threads(3), Recorder("a", 1 << 9), finite_bits((1 << 10, 1 << 9), 0)
    genuine, running, has_begun = threads._observe, threading.Semaphore(0), threading.Event()

    def observe(*arguments: int) -> int:
        if threading.current_thread() is threading.main_thread():
            assert has_begun.wait(60)
            threading.Timer(0.05, lambda: [running.release() for _ in range(2)]).start()
            raise KeyboardInterrupt
        has_begun.set()
        running.acquire()
        found = genuine(*arguments)
        ended.append(found)
        return found

    ended: list[int] = []
    monkeypatch.setattr(threads, "_observe", observe)
    with pytest.raises(KeyboardInterrupt):
        recorder.add(*placed(values), Rows.of(np.zeros(len(values), np.int32)), threads)
    assert len(ended) == 2
    threads.close()


def test_rows_that_belong_to_nobody_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 5 rows, and prompts are known for 4"):
        Recorder("a", 7).add(*placed(finite_bits((5, 7), 0)), Rows.of(np.zeros(4, np.int32)), Threads(1))
    with pytest.raises(ValueError, match="a kernel takes"):
        Rows.of(np.zeros(8, np.int32)[::2])
