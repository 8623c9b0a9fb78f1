"""Carrying out a plan in a staging directory: amax pass, bands, checkpoints, finished shards."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from threading import Lock
from typing import TypeAlias

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from fp8pack.checkpoint.announcement import plain_metadata
from fp8pack.checkpoint.header import build_header
from fp8pack.checkpoint.journal import BandResult, Progress, Record
from fp8pack.checkpoint.shard_writer import sync_file
from fp8pack.checkpoint.source import Source
from fp8pack.errors import InputError
from fp8pack.modelfacts.patterns import ignoring
from fp8pack.numerics.rounding import DAMPING
from fp8pack.numerics.scaling import CANDIDATES, better_scales, scale_of
from fp8pack.packing.amax_pass import AmaxCollector
from fp8pack.packing.bands import Band, BandWorker, OutputPlace
from fp8pack.packing.codecs import Codec
from fp8pack.packing.feedbacks import Feedbacks
from fp8pack.packing.side_work import SideWork
from fp8pack.packing.target import Folder, Target
from fp8pack.packing.workers import Stop, run_threads
from fp8pack.planning.layout import ShardPlan
from fp8pack.planning.plan import Action, PackPlan, Plan, TensorPlan

_Job: TypeAlias = "tuple[ShardWork, Band] | SideWork"


@dataclass(slots=True)
class ShardWork:
    """An output shard while it is made; `results` holds its finished bands, `pending` those not journalled yet."""

    plan: ShardPlan
    tensors: tuple[TensorPlan, ...]
    digest: str
    metadata: Mapping[str, str]  # the free text of the header
    header_nbytes: int
    places: dict[str, OutputPlace]
    num_bands: int
    constants: tuple[tuple[int, bytes], ...] = ()  # small tensors that the plan itself knows, and their offsets
    results: dict[tuple[str, int], BandResult] = field(default_factory=dict)
    pending: list[BandResult] = field(default_factory=list)
    pending_nbytes: int = 0
    num_synced: int = 0
    is_done: bool = False
    is_lost: bool = False
    lock: Lock = field(default_factory=Lock)

    @property
    def size(self) -> int:
        """Bytes of the output file."""
        return self.header_nbytes + self.plan.nbytes

    def header(self) -> bytes:
        """Return the header of the output file, made anew: of many tensors it is long."""
        return build_header(self.plan.tensors, self.plan.begins, self.metadata)

    @property
    def is_complete(self) -> bool:
        """Whether every band is finished."""
        return len(self.results) == self.num_bands

    def record(self, result: BandResult, nbytes: int, checkpoint_nbytes: int) -> list[BandResult]:
        """Add a finished band; return those to be synced now, none while less than a checkpoint waits."""
        with self.lock:
            self.results[result.tensor, result.index] = result
            self.pending.append(result)
            self.pending_nbytes += nbytes
            if not self.is_complete and self.pending_nbytes < checkpoint_nbytes:
                return []
            ready, self.pending, self.pending_nbytes = self.pending, [], 0
            return ready

    def missing(self) -> Iterator[Band]:
        """Yield the bands that are not finished, in the order of the source."""
        for tensor in self.tensors:
            for index in range(tensor.num_bands):
                if (tensor.spec.name, index) not in self.results:
                    yield Band(tensor, index)


@dataclass(slots=True)
class Counters:
    """Bytes of source to go through, gone through, and taken over from an earlier run."""

    total_nbytes: int
    done_nbytes: int = 0
    resumed_nbytes: int = 0
    lock: Lock = field(default_factory=Lock)

    def add(self, nbytes: int) -> None:
        """Count bytes as gone through."""
        with self.lock:
            self.done_nbytes += nbytes


def plan_work(plan: Plan, source: Source) -> tuple[ShardWork, ...]:
    """Return the shards to be made, each with the digest of its part of the plan."""
    by_data = {tensor.data.name: tensor for tensor in plan.tensors}
    metadata = {file.name: plain_metadata(file.metadata) for file in source.files}
    default = metadata[source.files[0].name] if source.is_single_file else {}
    groups: dict[str, list[str]] = {}
    for tensor in plan.packed:
        if tensor.packing and tensor.packing.two_pass:
            groups.setdefault(tensor.packing.scale_group, []).append(tensor.spec.name)
    works = []
    for shard in plan.shards:
        tensors = [by_data[stored.name] for stored in shard.tensors if stored.name in by_data]
        tensors.sort(key=lambda tensor: (tensor.spec.file, tensor.spec.begin))
        about = {"format": "pt", **metadata.get(shard.file, default), **shard.metadata}
        header = build_header(shard.tensors, shard.begins, about)
        begins = {stored.name: begin for stored, begin in zip(shard.tensors, shard.begins, strict=True)}
        places = {
            t.spec.name: OutputPlace(
                *(shard.file, len(header), begins[t.data.name]), begins[t.packing.scale.name] if t.packing else 0
            )
            for t in tensors
        }
        constants = tuple(
            (len(header) + begins[constant.stored.name], constant.data)
            for tensor in tensors
            for constant in tensor.constants
        )
        digest = _digest(source, header, tensors, groups, constants, _rounding_digest(plan))
        num_bands = sum(tensor.num_bands for tensor in tensors)
        works.append(ShardWork(shard, tuple(tensors), digest, about, len(header), places, num_bands, constants))
    return tuple(works)


class Execution:
    """One run over the shards of a plan. Every finished piece goes to the journal, so that another run can go on."""

    def __init__(  # noqa: PLR0913
        self,
        plan: Plan,
        source: Source,
        sides: Sequence[SideWork],
        *,
        folder: Path,
        journal: Record,
        target: Target | None = None,
        checkpoint_nbytes: int,
    ) -> None:
        self._plan, self._sides = plan, sides
        self.works = plan_work(plan, source)
        self._two_pass = [tensor for tensor in plan.packed if tensor.packing and tensor.packing.two_pass]
        side_nbytes = sum(work.side.size for work in sides)
        self._searched = [tensor for tensor in self._two_pass if tensor.packing and tensor.packing.searched]
        passes = sum(tensor.spec.nbytes for tensor in (*self._two_pass, *self._searched))
        self.counters = Counters(plan.source_nbytes + passes + side_nbytes)
        self._source, self._folder, self._journal = source, folder, journal
        self._target = target or Folder(folder)
        self._checkpoint_nbytes = checkpoint_nbytes
        self._feedbacks = Feedbacks(plan.recipe.calibration if isinstance(plan, PackPlan) else None)
        self._amax: dict[str, float] = {}
        self._offenders: set[str] = set()

    def resume(self, progress: Progress) -> None:
        """Take over what a journal says is finished, still lies there, and fits this plan."""
        self._amax = dict(progress.amax)
        for work in self.works:
            key = (work.plan.file, work.digest)
            path = self._folder / work.plan.file
            if path.exists() and path.stat().st_size == work.size:
                work.results = {(result.tensor, result.index): result for result in progress.bands.get(key, [])}
                work.num_synced = len(work.results)
                work.is_done = key in progress.done and work.is_complete
                self.counters.resumed_nbytes += sum(
                    Band(tensor, i).nbytes
                    for tensor in work.tensors
                    for i in range(tensor.num_bands)
                    if (tensor.spec.name, i) in work.results
                )
        for side in self._sides:
            path = self._folder / side.side.name
            if path.is_file() and path.stat().st_size == side.side.size:
                side.digest = progress.sides.get((side.side.name, side.side.version), "")
                self.counters.resumed_nbytes += side.side.size if side.digest else 0
        self.counters.done_nbytes = self.counters.resumed_nbytes

    @property
    def is_done(self) -> bool:
        """Whether every shard and every side file is finished."""
        return all(work.is_done for work in self.works) and all(work.digest for work in self._sides)

    def remaining_nbytes(self) -> int:
        """Return the bytes that the outputs still need on the disk."""
        shards = sum(work.size for work in self.works if not work.results)
        return shards + sum(work.side.size for work in self._sides if not work.digest)

    def run(self, codec: Codec, *, workers: int, stop: Stop, tick: Callable[[], None]) -> None:
        """Make every shard and copy every side file. What is finished stays finished, whatever ends the run.

        Raises:
            InputError: weights hold a NaN or infinity; all of them are named. Finished work is kept.
            SpaceError: the disk is full or not writable.
        """
        for work in self.works:
            if not work.results:
                self._target.start(work.plan.file, work.header(), work.size, work.constants)
        self._find_amax(codec, workers, stop, tick)
        scales = self._search_scales(self._scales(), codec, workers, stop, tick)
        copies = (iter([work]) for work in self._sides if not work.digest)
        streams = (self._jobs(work, scales) for work in self.works if not work.is_done)
        if any(tensor.packing and tensor.packing.compensation for tensor in self._plan.packed):
            streams = (stream for stream in [chain.from_iterable(streams)])  # all threads share one feedback
        with ThreadPoolExecutor(max_workers=1) as syncing:

            def sync(work: ShardWork, results: list[BandResult]) -> None:
                syncing.submit(self._sync, stop, work, results)

            def copy(work: SideWork) -> None:
                if digest := work.copy(self._source.directory, self._folder, stop=stop, count=self.counters.add):
                    syncing.submit(self._sync_side, stop, work, digest)

            jobs: Iterator[Iterator[_Job]] = chain(copies, streams)
            try:
                run_threads(jobs, lambda: self._worker(codec, scales, sync, copy), count=workers, stop=stop, tick=tick)
            finally:
                for work in self.works:
                    sync(work, work.pending)
        if stop.errors:
            raise stop.errors[0]
        if self.is_done or stop.is_set():
            return
        raise self._error_of_offenders()

    def _error_of_offenders(self) -> InputError:
        """The error of weights with a NaN or infinity, which can be ignored, and of values out of range."""
        if beyond := [t for t in self._plan.tensors if t.action == Action.CAST and t.spec.name in self._offenders]:
            names = ", ".join(sorted(tensor.spec.name for tensor in beyond))
            dtype = beyond[0].data.dtype
            remedy = "choose --kept-dtype bfloat16" if dtype == "F16" else "leave out --kept-dtype"
            return InputError(f"{beyond[0].spec.file}: values out of range of {dtype} in {names}", remedy)
        packed = sorted(
            tensor.spec.name
            for tensor in self._plan.packed
            if tensor.spec.name in self._offenders and tensor.quantized is None
        )
        if others := sorted(self._offenders.difference(packed)):
            names = ", ".join(others)
            return InputError(f"{len(others)} tensors contain a NaN, or values out of range of the new dtype: {names}")
        weights = "1 weight contains" if len(packed) == 1 else f"{len(packed)} weights contain"
        return InputError(f"{weights} a NaN or infinity: {', '.join(packed)}", f"{ignoring(*packed)} packs the rest")

    def _jobs(self, work: ShardWork, scales: dict[str, np.float32]) -> Iterator[tuple[ShardWork, Band]]:
        for band in work.missing():
            name, packing = band.tensor.spec.name, band.tensor.packing
            if name not in self._offenders and (packing is None or not packing.two_pass or name in scales):
                yield work, band

    def _find_amax(self, codec: Codec, workers: int, stop: Stop, tick: Callable[[], None]) -> None:
        todo = [tensor for tensor in self._two_pass if tensor.spec.name not in self._amax]
        self.counters.add(
            sum(tensor.spec.nbytes for tensor in self._two_pass) - sum(tensor.spec.nbytes for tensor in todo)
        )
        if not todo:
            return
        collector = AmaxCollector(self._journal, self._checkpoint_nbytes)

        @contextmanager
        def make_worker() -> Iterator[Callable[[Band], None]]:
            def work(band: Band) -> None:
                collector.add(band, worker.amax(band))
                self.counters.add(band.nbytes)

            with closing(BandWorker(codec, self._source, self._target, self._feedbacks)) as worker:
                yield work

        files = [list(members) for _, members in groupby(todo, key=lambda tensor: tensor.spec.file)]
        try:
            run_threads([_bands(tensors) for tensors in files], make_worker, count=workers, stop=stop, tick=tick)
        finally:
            collector.flush()
        self._offenders |= {name for name, amax in collector.amax.items() if math.isnan(amax)}
        self._amax |= {name: amax for name, amax in collector.amax.items() if not math.isnan(amax)}

    def _scales(self) -> dict[str, np.float32]:
        """The scale of each two-pass tensor: that of the largest amax among the tensors it is fused with.

        A group with a member whose amax is not known, because it holds a NaN, has no scale and is not packed.
        """
        packings = {tensor.spec.name: tensor.packing for tensor in self._two_pass if tensor.packing}
        groups: dict[str, list[float | None]] = {}
        for name, packing in packings.items():
            groups.setdefault(packing.scale_group, []).append(self._amax.get(name))
        known = {group: [amax for amax in found if amax is not None] for group, found in groups.items()}
        return {
            name: scale_of(max(known[packing.scale_group]), packing.format, packing.rounding)
            for name, packing in packings.items()
            if len(known[packing.scale_group]) == len(groups[packing.scale_group])
        }

    def _search_scales(
        self, scales: dict[str, np.float32], codec: Codec, workers: int, stop: Stop, tick: Callable[[], None]
    ) -> dict[str, np.float32]:
        """The scales of two-pass tensors, those that are searched for replaced by the best for all that share one.

        Errors are added up in the order of the plan, whichever thread found them.
        """
        todo = [tensor for tensor in self._searched if tensor.spec.name in scales]
        found: dict[tuple[str, int], NDArray[np.float64]] = {}

        @contextmanager
        def make_worker() -> Iterator[Callable[[Band], None]]:
            def work(band: Band) -> None:
                if (packing := band.tensor.packing) is not None:
                    name = band.tensor.spec.name
                    found[name, band.index] = worker.scale_errors(band, packing, scales[name])
                self.counters.add(band.nbytes)

            with closing(BandWorker(codec, self._source, self._target, self._feedbacks)) as worker:
                yield work

        files = [list(members) for _, members in groupby(todo, key=lambda tensor: tensor.spec.file)]
        run_threads([_bands(tensors) for tensors in files], make_worker, count=workers, stop=stop, tick=tick)
        if stop.is_set():
            return {}
        totals: dict[str, NDArray[np.float64]] = {}
        for tensor in todo:
            group = tensor.packing.scale_group if tensor.packing else ""
            totals.setdefault(group, np.zeros(CANDIDATES.size))
            for index in range(tensor.num_bands):
                totals[group] += found[tensor.spec.name, index]
        better = {
            tensor.spec.name: better_scales(np.array([scales[tensor.spec.name]]), totals[tensor.packing.scale_group])[0]
            for tensor in todo
            if tensor.packing
        }
        return scales | better

    @contextmanager
    def _worker(
        self,
        codec: Codec,
        scales: dict[str, np.float32],
        sync: Callable[[ShardWork, list[BandResult]], object],
        copy: Callable[[SideWork], None],
    ) -> Iterator[Callable[[_Job], None]]:
        def do(job: _Job) -> None:
            if isinstance(job, SideWork):
                copy(job)
            else:
                work_band(*job)

        def work_band(work: ShardWork, band: Band) -> None:
            name = band.tensor.spec.name
            place, packing = work.places[name], band.tensor.packing
            if packing is None:
                result = keep[band.tensor.action](band, place)
            elif packing.carried:
                result = worker.carry(band, packing, place)
            else:
                result = worker.pack(band, packing, place, scales.get(name, np.float32(0)))
            self.counters.add(band.nbytes)
            if math.isnan(result.amax):
                self._offenders.add(name)
            elif ready := work.record(result, band.nbytes, self._checkpoint_nbytes):
                sync(work, ready)

        with closing(BandWorker(codec, self._source, self._target, self._feedbacks)) as worker:
            keep = {Action.COPIED: worker.copy, Action.CAST: worker.cast, Action.UNPACKED: worker.unpack}
            yield do

    def _sync(self, stop: Stop, work: ShardWork, results: list[BandResult]) -> None:
        """Bring bands to the disk, then say so in the journal; check the shard when it is complete.

        One thread does this for all shards, so that the workers never wait for a disk. An error stops everything.
        """
        try:
            if results and not work.is_lost:
                work.is_lost = True  # unless the sync succeeds: the kernel drops pages that it failed to write
                self._target.sync(work.plan.file)
                work.is_lost = False
                self._journal.add_bands(work.plan.file, work.digest, results)
                work.num_synced += len(results)
            if work.num_synced == work.num_bands and not work.is_done:
                self._target.check(work.plan)
                self._journal.add_done(work.plan.file, work.digest)
                work.is_done = True
        except BaseException as error:
            stop.fail(error)

    def _sync_side(self, stop: Stop, work: SideWork, digest: str) -> None:
        """Bring a copied side file to the disk, then say so in the journal."""
        try:
            sync_file(self._folder / work.side.name)
            self._journal.add_side(work.side.name, work.side.version, digest)
            work.digest = digest
        except BaseException as error:
            stop.fail(error)


def _bands(tensors: list[TensorPlan]) -> Iterator[Band]:
    return (Band(tensor, index) for tensor in tensors for index in range(tensor.num_bands))


def _digest(
    source: Source,
    header: bytes,
    tensors: list[TensorPlan],
    groups: dict[str, list[str]],
    constants: tuple[tuple[int, bytes], ...],
    rounding: str,
) -> str:
    """The digest of a shard's part of the plan: what is read, how it is packed, and where it goes."""
    hasher = blake3(source.fingerprint.encode())
    hasher.update(rounding.encode())
    hasher.update(header)
    for _, data in constants:
        hasher.update(data)
    for tensor in tensors:
        spec, bands = tensor.spec, [tensor.band_rows, tensor.band_cols]
        where = [spec.name, spec.file, spec.begin, spec.strides]
        hasher.update(json.dumps([tensor.action, where, bands, _how(tensor, groups)]).encode())
    return hasher.hexdigest()


def _rounding_digest(plan: Plan) -> str:
    """What compensated rounding depends on, empty for rounding to nearest."""
    recipe = plan.recipe if isinstance(plan, PackPlan) else None
    if recipe is None or recipe.rounding == "nearest" or recipe.calibration is None:
        return ""
    return f"{recipe.rounding} {DAMPING} {recipe.calibration.digest}"


def _how(tensor: TensorPlan, groups: dict[str, list[str]]) -> list[object]:
    packing, quantized = tensor.packing, tensor.quantized
    how: list[object] = []
    if packing:
        how += [packing.format.name, packing.granularity.name, packing.rounding.value, packing.carried, packing.tiled]
        how += [groups.get(packing.scale_group, [])]
        how += [packing.searched, [*packing.compensation.points] if packing.compensation else []]
    if quantized:
        scale = quantized.scale
        how += [quantized.granularity.name, quantized.tiled, [scale.file, scale.begin, scale.dtype] if scale else []]
        how += [[other.name, other.begin] for other in (quantized.global_scale, quantized.zero_point) if other]
    how += [[part.spec.file, part.spec.begin, part.view.name, part.view.begin] for part in tensor.parts]
    return how
