"""Merging calibrations: exact in any order of the files, equal to one run over all prompts, or a sentence."""

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import DEMO
from numpy.typing import NDArray

from fp8pack.calibration.calibrate import calibrate
from fp8pack.calibration.merge import join, merge
from fp8pack.checkpoint.calibration_file import read_calibration, write_calibration
from fp8pack.errors import Fp8PackError, InputError, OutputError, SpaceError
from fp8pack.planning.calibration import Calibration, Site

POINTS = (("a.experts.0.up.input",), ("a.k",), ("a.norm.output", "a.q.input", "a.k.input"), ("b.down.input",))
OPTIONS = {"max_length": 64, "batch_size": 1, "all_experts": False, "until_converged": False}

Values = dict[tuple[str, ...], list[NDArray[Any]]]  # of each site, [T, K] of each prompt


def random_values(seed: int, prompts: int) -> Values:
    """Return what passes each site in each prompt; some prompts do not get to the expert."""
    random = np.random.default_rng(seed)
    found: Values = {}
    for channels, points in enumerate(POINTS, 3):
        found[points] = []
        for _ in range(prompts):
            tokens = int(random.integers(0, 4)) if "experts" in points[0] else int(random.integers(1, 20))
            values = random.standard_normal((tokens, channels)) * random.lognormal()
            found[points].append(values.astype(ml_dtypes.bfloat16))
    return found


def calibration_of(values: Values, names: Iterable[str], *, without: str = "") -> Calibration:
    """Count the statistics of values here, without the code under test."""
    sites = []
    for points, prompts in values.items():
        if without and without in points[0]:
            continue
        together = np.concatenate(prompts)
        bits = together.view(np.uint16) & 0x7FFF
        bins, counts = np.unique(bits, return_counts=True)
        history = [int((prompt.view(np.uint16) & 0x7FFF).max(initial=0)) for prompt in prompts]
        sites.append(
            Site(
                points,
                len(together),
                bins.astype(np.uint16),
                counts.astype(np.int64),
                bits.max(axis=0, initial=0).astype(np.uint16),
                (together.astype(np.float64) ** 2).sum(axis=0),
                np.array(history, np.uint16),
            )
        )
    return Calibration("blake3:model", tuple(names), OPTIONS, tuple(sites))


def named(seed: int, prompts: int, **options: Any) -> tuple[Values, Calibration]:
    values = random_values(seed, prompts)
    return values, calibration_of(values, (f"blake3:{seed:04}-{i}" for i in range(prompts)), **options)


def assert_equal(found: Calibration, expected: Calibration) -> None:
    """Everything agrees exactly, the sums of squares to 1e-12 of their value."""
    assert (found.fingerprint, found.prompts, found.options) == (
        expected.fingerprint,
        expected.prompts,
        expected.options,
    )
    for ours, theirs in ((found.sites, expected.sites), (found.all_experts, expected.all_experts)):
        assert [(site.points, site.tokens) for site in ours] == [(site.points, site.tokens) for site in theirs]
        for a, b in zip(ours, theirs, strict=True):
            for name in ("bins", "counts", "channel_amax", "prompt_amax"):
                x, y = getattr(a, name), getattr(b, name)
                assert (x.dtype, x.tolist()) == (y.dtype, y.tolist()), (a.points, name)
            np.testing.assert_allclose(a.channel_squares, b.channel_squares, rtol=1e-12, atol=0)


# Made-up calibrations.


@pytest.mark.parametrize("seed", range(5))
def test_a_merge_is_what_one_run_over_all_prompts_would_have_counted(seed: int, tmp_path: Path) -> None:
    made = [named(10 * seed + i, prompts) for i, prompts in enumerate((3, 1, 5))]
    for order in itertools.permutations(range(3)):
        paths = []
        for i in order:
            paths.append(tmp_path / f"{i}.safetensors")
            write_calibration(paths[-1], made[i][1])
        facts = merge(paths, tmp_path / "all.safetensors", overwrite=True)
        together = {points: [prompt for i in order for prompt in made[i][0][points]] for points in POINTS}
        digests = [digest for i in order for digest in made[i][1].prompts]
        assert_equal(read_calibration(tmp_path / "all.safetensors"), calibration_of(together, digests))
        assert (facts.num_merged, facts.num_prompts, facts.num_sites) == (3, 9, len(POINTS))


def test_merging_in_two_steps_gives_what_one_step_gives() -> None:
    a, b, c = (named(seed, 2)[1] for seed in (1, 2, 3))
    assert_equal(join([("ab", join([("a", a), ("b", b)])), ("c", c)]), join([("a", a), ("b", b), ("c", c)]))


def test_a_merge_of_one_is_the_same(tmp_path: Path) -> None:
    write_calibration(tmp_path / "a.safetensors", named(1, 3)[1])
    merge([tmp_path / "a.safetensors"], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_site_that_only_one_has_saw_nothing_in_the_prompts_of_the_others() -> None:
    _, with_expert = named(1, 3)
    values, without = named(2, 2, without="experts")
    for order in ((with_expert, without), (without, with_expert)):
        found = join([(str(i), calibration) for i, calibration in enumerate(order)])
        site = found.by_point["a.experts.0.up.input"]
        alone = with_expert.by_point["a.experts.0.up.input"]
        seen, unseen = alone.prompt_amax.tolist(), [0] * 2
        assert site.prompt_amax.tolist() == (seen + unseen if order[0] is with_expert else unseen + seen)
        assert (site.tokens, site.counts.tolist()) == (alone.tokens, alone.counts.tolist())
        assert [entry.points[0] for entry in found.sites] == [points[0] for points in POINTS]
    assert values


def test_a_site_without_tokens_joins_one_that_has_some() -> None:
    _, some = named(1, 3)
    empty = Calibration("blake3:model", ("p",), OPTIONS, tuple(_emptied(site) for site in some.sites))
    found = join([("empty", empty), ("some", some)])
    for ours, theirs in zip(found.sites, some.sites, strict=True):
        assert ours.prompt_amax.tolist() == [0, *theirs.prompt_amax.tolist()]
        assert (ours.tokens, ours.amax) == (theirs.tokens, theirs.amax)


def _emptied(site: Site) -> Site:
    return replace(
        site,
        tokens=0,
        bins=site.bins[:0],
        counts=site.counts[:0],
        channel_amax=site.channel_amax * np.uint16(0),
        channel_squares=site.channel_squares * 0,
        prompt_amax=np.zeros(1, np.uint16),
    )


def test_all_experts_are_merged_too() -> None:
    a, b = (replace(named(seed, 2)[1], all_experts=named(seed + 50, 2)[1].sites) for seed in (1, 2))
    only_b = replace(a, all_experts=())
    found = join([("a", a), ("b", b)])
    expected = join([("a", replace(a, sites=a.all_experts)), ("b", replace(b, sites=b.all_experts))]).sites
    assert_equal(replace(found, sites=(), all_experts=expected), replace(found, sites=()))
    alone = join([("a", only_b), ("b", b)]).all_experts
    assert [site.prompt_amax[:2].tolist() for site in alone] == [[0, 0]] * len(POINTS)


# What is refused.


def other_channels(calibration: Calibration) -> Calibration:
    values = {points: [prompt[:, :-1] for prompt in prompts] for points, prompts in random_values(2, 3).items()}
    return replace(calibration_of(values, ["p"] * 3), prompts=calibration.prompts)


REFUSED: dict[str, tuple[Callable[[Calibration], Calibration], str]] = {
    "another-model": (lambda c: replace(c, fingerprint="blake3:other"), "another model"),
    "no-model-named": (lambda c: replace(c, fingerprint=""), "another model"),
    "other-options": (lambda c: replace(c, options={**OPTIONS, "max_length": 65}), "other options"),
    "fewer-options": (lambda c: replace(c, options={}), "other options"),
    "a-shared-prompt": (lambda c: replace(c, prompts=(*c.prompts[:2], "blake3:0001-0")), "contain the same prompt"),
    "other-points": (
        lambda c: replace(c, sites=(*c.sites[:2], replace(c.sites[2], points=c.sites[2].points[:2]), c.sites[3])),
        "shares its input",
    ),
    "other-channels": (other_channels, "shares its input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_belong_together_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    write_calibration(tmp_path / "first.safetensors", named(1, 3)[1])
    write_calibration(tmp_path / "second.safetensors", change(named(2, 3)[1]))
    with pytest.raises(InputError, match=words) as caught:
        merge([tmp_path / "first.safetensors", tmp_path / "second.safetensors"], tmp_path / "out.safetensors")
    assert "second.safetensors" in str(caught.value) or name in ("other-points", "other-channels")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_calibration(path, named(1, 2)[1])
    with pytest.raises(InputError, match=r"contain the same prompt|twice"):
        merge([path, path], tmp_path / "out.safetensors")


def test_a_file_that_is_not_there_and_one_that_is_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.safetensors does not exist"):
        merge([tmp_path / "absent.safetensors"], tmp_path / "out.safetensors")
    weights = next(DEMO.glob("*.safetensors"))
    with pytest.raises(InputError, match="is not a calibration file"):
        merge([weights], tmp_path / "out.safetensors")
    with pytest.raises(InputError):
        merge([DEMO], tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="nothing to merge"):
        merge([], tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_two_options_that_differ_much_are_still_one_short_line() -> None:
    first = named(1, 2)[1]
    second = replace(named(2, 2)[1], options={"note": "a\nb" * 10_000})
    with pytest.raises(InputError) as caught:
        join([("a", first), ("b", second)])
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("depth", [100, 400, 900])
def test_options_nested_deep_are_refused_or_told(depth: int, tmp_path: Path) -> None:
    """Options come from a file: however deep they are, there is a document or a sentence."""
    options: Any = 1
    for _ in range(depth):
        options = [options]
    path = tmp_path / "deep.safetensors"
    write_calibration(path, replace(named(1, 2)[1], options={"a": options}))
    try:
        facts = merge([path], tmp_path / "out.safetensors")
    except Fp8PackError as error:
        assert len(str(error).splitlines()) == 1
    else:
        json.dumps(facts.to_dict(), indent=2)


def test_a_site_whose_name_holds_odd_digits_can_be_merged(tmp_path: Path) -> None:
    calibration = named(1, 2)[1]
    odd = replace(calibration, sites=(replace(calibration.sites[0], points=("layers.1²2.up.input",)),))
    write_calibration(tmp_path / "a.safetensors", odd)
    merge([tmp_path / "a.safetensors"], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


# Where it is written.


def test_an_output_that_exists_is_left_alone_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    write_calibration(a, named(1, 2)[1])
    write_calibration(b, named(2, 2)[1])
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        merge([a, b], out)
    assert out.read_text() == "mine"
    merge([a, b], out, overwrite=True)
    again = merge([a, b], out)  # as after a kill at the very end
    assert again.already_complete
    with pytest.raises(OutputError, match="exists"):
        merge([a], out)
    merge([a, b], a, overwrite=True)  # over one of them
    assert a.read_bytes() == out.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "out.safetensors"]


def test_a_directory_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    write_calibration(tmp_path / "a.safetensors", named(1, 2)[1])
    (tmp_path / "out.safetensors").mkdir()
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            merge([tmp_path / "a.safetensors"], tmp_path / "out.safetensors", overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "out.safetensors"]


def test_an_output_in_no_directory_is_a_sentence(tmp_path: Path) -> None:
    write_calibration(tmp_path / "a.safetensors", named(1, 2)[1])
    with pytest.raises(SpaceError):
        merge([tmp_path / "a.safetensors"], tmp_path / "absent" / "out.safetensors")


def test_a_name_too_long_for_a_file_system_is_a_sentence(tmp_path: Path) -> None:
    write_calibration(tmp_path / "a.safetensors", named(1, 2)[1])
    for length in (240, 300):
        with pytest.raises(Fp8PackError):
            merge([tmp_path / "a.safetensors"], tmp_path / f"{'a' * length}.safetensors")


# Real runs.


def write_prompts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("stream_layers", ["off", "on"])
def test_two_halves_of_the_prompts_merge_to_what_one_run_over_all_of_them_gives(
    stream_layers: str, tmp_path: Path
) -> None:
    words = (DEMO / "heldout.txt").read_text().split()
    texts = [" ".join(words[40 * i : 40 * i + 10 + i]) for i in range(36)]
    files = {"all": texts, "first": texts[:18], "second": texts[18:]}
    found = {}
    for name, part in files.items():
        output = tmp_path / f"{name}.safetensors"
        prompts = write_prompts(tmp_path / f"{name}.jsonl", part)
        calibrate(DEMO, output, prompts=str(prompts), max_length=64, stream_layers=stream_layers)
        found[name] = read_calibration(output)
    merge([tmp_path / "first.safetensors", tmp_path / "second.safetensors"], tmp_path / "merged.safetensors")
    merged = read_calibration(tmp_path / "merged.safetensors")
    assert len(merged.prompts) == 36
    assert_equal(merged, found["all"])
    swapped = join([("second", found["second"]), ("first", found["first"])])
    assert set(swapped.prompts) == set(merged.prompts)
    for ours, theirs in zip(swapped.sites, merged.sites, strict=True):
        assert (ours.points, ours.tokens) == (theirs.points, theirs.tokens)
        assert (ours.bins.tolist(), ours.counts.tolist()) == (theirs.bins.tolist(), theirs.counts.tolist())
        assert ours.channel_amax.tolist() == theirs.channel_amax.tolist()
