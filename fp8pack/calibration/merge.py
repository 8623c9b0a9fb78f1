"""`merge`: joins calibration files of one model."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fp8pack.checkpoint.calibration_file import read_calibration, write_calibration
from fp8pack.checkpoint.staging import check_output_file
from fp8pack.errors import InputError, OutputError, RecipeError
from fp8pack.inputs import Paths, parse_path, parse_paths
from fp8pack.planning.calibration import Calibration, Moments, Site, site_order
from fp8pack.planning.calibration_summary import CalibrationSummary, summarize


def merge(calibrations: Paths, output: str | Path, *, overwrite: bool = False) -> CalibrationSummary:
    """Write the union of calibration files of one model.

    Prompts are in the order of the files. amax, histograms and counts are exact in any order; sums of squares and
    second moments agree to 1e-12 of their value.

    Raises:
        InputError: a file is not a calibration file, two files are of different models or options, or contain the same
            prompt.
        OutputError: the output exists, and is no merge of these. RecipeError: the output is not a .safetensors file.
    """
    paths = parse_paths("calibrations", calibrations)
    target = Path(os.path.abspath(parse_path("output", output)))
    if target.suffix != ".safetensors":
        raise RecipeError(f"output {target.name} is not a .safetensors file")
    check_output_file(target, None, overwrite=overwrite)
    joined = join([(path.name, read_calibration(path)) for path in paths])
    is_there = target.exists() and not overwrite
    if is_there and not _is_same(target, joined):
        raise OutputError(f"{target} exists", "choose another -o, or --overwrite replaces it")
    if not is_there:
        write_calibration(target, joined)
    return replace(summarize(joined, output=target), num_merged=len(paths), already_complete=is_there)


def _is_same(target: Path, joined: Calibration) -> bool:
    """Say whether a file is of the same model, options and prompts: a merge that was killed at its very end."""
    try:
        found = read_calibration(target)
    except InputError:
        return False
    return (found.fingerprint, found.options, found.prompts) == (joined.fingerprint, joined.options, joined.prompts)


def join(calibrations: Sequence[tuple[str, Calibration]]) -> Calibration:
    """Return the union of named calibrations; raises as `merge` does."""
    if not calibrations:
        raise InputError("there is nothing to merge")
    name, first = calibrations[0]
    seen: dict[str, str] = {}
    for other_name, other in calibrations:
        if other.fingerprint != first.fingerprint:
            raise InputError(f"{other_name} is of another model than {name}")
        if other.options != first.options:
            keys = sorted(
                key for key in {**first.options, **other.options} if first.options.get(key) != other.options.get(key)
            )
            raise InputError(f"{other_name} was made with other options than {name}: {', '.join(keys)[:200]!r} differ")
        for digest in other.prompts:
            if digest in seen:
                raise InputError(
                    f"{other_name} and {seen[digest]} contain the same prompt {digest[:19]}…", "merge each prompt once"
                )
        seen.update(dict.fromkeys(other.prompts, other_name))
    found = [calibration for _, calibration in calibrations]
    counts = [len(calibration.prompts) for calibration in found]
    return Calibration(
        first.fingerprint,
        tuple(digest for calibration in found for digest in calibration.prompts),
        first.options,
        _join_sites([calibration.sites for calibration in found], counts),
        _join_sites([calibration.all_experts for calibration in found], counts),
        num_tokens=sum(calibration.num_tokens for calibration in found),
    )


def _join_sites(found: list[tuple[Site, ...]], counts: list[int]) -> tuple[Site, ...]:
    """Join the sites by name; a site that a file lacks, as of an expert without tokens, has zeros for its prompts."""
    by_name: dict[str, list[Site | None]] = {}
    for i, sites in enumerate(found):
        for site in sites:
            by_name.setdefault(site.points[0], [None] * len(found))[i] = site
    return tuple(sorted((_join(parts, counts) for parts in by_name.values()), key=site_order))


def _join(parts: list[Site | None], counts: list[int]) -> Site:
    sites = [site for site in parts if site is not None]
    first = sites[0]
    for site in sites[1:]:
        if site.points != first.points or site.channel_amax.shape != first.channel_amax.shape:
            raise InputError(
                f"{first.points[0]} shares its input with different modules, or has different channels, in the files",
                "observe both with torch.no_grad() instead of torch.inference_mode()",
            )
    bins = np.unique(np.concatenate([site.bins for site in sites]))
    histogram = np.zeros(bins.size, np.int64)
    for site in sites:
        histogram[np.searchsorted(bins, site.bins)] += site.counts
    history: Iterable[NDArray[np.uint16]] = (
        site.prompt_amax if site else np.zeros(count, np.uint16) for site, count in zip(parts, counts, strict=True)
    )
    return Site(
        first.points,
        sum(site.tokens for site in sites),
        bins,
        histogram,
        np.maximum.reduce([site.channel_amax for site in sites]),
        np.add.reduce([site.channel_squares for site in sites]),
        np.concatenate(list(history)),
        first.heads,
        _join_moments(sites),
    )


def _join_moments(sites: list[Site]) -> Moments | None:
    """The sum of the second moments, in the order of the files, made when it is asked for."""
    moments = [site.moments for site in sites if site.moments is not None]
    if len(moments) < len(sites):
        return None

    def load() -> NDArray[np.float64]:
        total = moments[0].load()
        for other in moments[1:]:
            total += other.load()
        return total

    return Moments(moments[0].block, load)
