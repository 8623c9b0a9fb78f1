"""Calibration with one layer in memory: all prompts through it, then the next layer."""

from functools import partial
from pathlib import Path

from fp8pack.calibration.calibration_journal import CalibrationJournal
from fp8pack.calibration.observers import Observation
from fp8pack.calibration.open_run import Run
from fp8pack.calibration.progress import Progress
from fp8pack.checkpoint.calibration_file import read_calibration, write_calibration
from fp8pack.checkpoint.shard_writer import sync_file
from fp8pack.modelrun.stream_layers import Rounds, Stack
from fp8pack.planning.calibration import Calibration, Site, site_order


def run_streamed(
    run: Run, stack: Stack, folder: Path, journal: CalibrationJournal, progress: Progress
) -> Calibration | None:
    """Run every layer that is not done, then the modules outside of layers; return None if the deadline is reached.

    folder: for the hidden states that are the next layer's input, and the statistics of finished layers.
    """
    loader, rounds = run.loader, Rounds(stack, folder)
    parameters = list(loader.model.state_dict())
    progress.start(run.num_tokens * journal.done)
    for index in range(journal.done, len(stack.layers) + 1):
        inside = f"{stack.path}.{index}."
        is_last = index == len(stack.layers)

        def wants(path: str, inside: str = inside, is_last: bool = is_last) -> bool:
            return not path.startswith(f"{stack.path}.") if is_last else f"{path}.".startswith(inside)

        if not is_last:
            loader.load(name for name in parameters if name.startswith(inside))
        observation = Observation(
            loader.model,
            loader.names,
            all_experts=run.options.all_experts,
            second_moments=run.options.second_moments,
            wants=wants,
        )
        with loader.without_logits(), rounds.round(index) as take, observation:
            for tokens, call in run.batches():
                take(partial(loader.model, **call))
                if progress.tick(tokens):
                    return None
        if not is_last:
            stack.layers[index].to("meta")
            sync_file(rounds.hidden_path(index + 1))
        calibration = observation.calibration(run.source.fingerprint, run.decisive)
        write_calibration(_layer_path(folder, index), calibration)
        journal.add(index + 1)
        rounds.hidden_path(index).unlink(missing_ok=True)
    return _gather(run, folder, len(stack.layers) + 1)


def _gather(run: Run, folder: Path, units: int) -> Calibration:
    sites: list[Site] = []
    all_experts: list[Site] = []
    for index in range(units):
        calibration = read_calibration(_layer_path(folder, index))
        sites += calibration.sites
        all_experts += calibration.all_experts
    return Calibration(
        run.source.fingerprint,
        run.digests,
        run.decisive,
        tuple(sorted(sites, key=site_order)),
        tuple(sorted(all_experts, key=site_order)),
        num_tokens=run.num_tokens,
    )


def _layer_path(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05}.safetensors"
