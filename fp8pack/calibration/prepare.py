"""Everything that is decided before the first token is run."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from fp8pack.calibration.model import ModelLoader, read_tokenizer
from fp8pack.calibration.observers import prompt_digest
from fp8pack.calibration.prompts import BUILT_IN, load_prompts, tokenize
from fp8pack.calibration.stream_layers import Stack, find_stack, probe
from fp8pack.checkpoint.source import Source, beside, open_checkpoint
from fp8pack.checkpoint.staging import check_output_file
from fp8pack.errors import InputError, RecipeError

FEWEST_PROMPTS, DEFAULT_PROMPTS, MOST_PROMPTS = 128, 256, 512
STREAM_LAYERS = ("auto", "on", "off")
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """How to calibrate. None stands for the default: max_length for the model's, 2048 at most."""

    output: Path | None = None
    prompts: str = BUILT_IN
    num_prompts: int = DEFAULT_PROMPTS
    max_length: int | None = None
    batch_size: int = 1
    all_experts: bool = False
    until_converged: bool = False
    stream_layers: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    resume: bool = True
    overwrite: bool = False
    deadline_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that is known before the first token is run."""

    source: Source
    loader: ModelLoader
    stack: Stack | None
    ids: tuple[tuple[int, ...], ...]
    digests: tuple[str, ...]
    pad: int
    decisive: dict[str, Any]
    output: Path
    options: CalibrateOptions
    notes: tuple[str, ...]

    @property
    def head(self) -> dict[str, Any]:
        """What makes an unfinished calibration the same as this one."""
        prompts = blake3("".join(self.digests).encode()).hexdigest()
        streamed = self.stack is not None
        return {
            "fingerprint": self.source.fingerprint,
            "prompts": prompts,
            "options": self.decisive,
            "streamed": streamed,
        }

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.ids))

    def batches(self) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Yield the number of tokens and the arguments of each call, padded on the right where lengths differ."""
        for start in range(0, len(self.ids), self.options.batch_size):
            rows = self.ids[start : start + self.options.batch_size]
            length = max(map(len, rows))
            padded = [[*row, *[self.pad] * (length - len(row))] for row in rows]
            call = {"input_ids": torch.tensor(padded, device=self.loader.device)}
            if any(len(row) < length for row in rows):
                mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
                call["attention_mask"] = torch.tensor(mask, device=self.loader.device)
            yield sum(map(len, rows)), call


def prepare(model: Path, options: CalibrateOptions) -> Run:
    """Open the checkpoint, read the prompts and decide how to run; raises as `calibrate` does."""
    source = open_checkpoint(model)
    output = Path(os.path.abspath(options.output or beside(source, f"{source.name}-calibration.safetensors")))
    if output.suffix != ".safetensors":
        raise RecipeError(f"-o must name a .safetensors file, not {output.name}")
    check_output_file(output, source.path, overwrite=options.overwrite)
    prompts = load_prompts(options.prompts, options.num_prompts)
    if not prompts:
        raise InputError(f"{options.prompts} holds no prompt")
    device = _device(options.device)
    loader = ModelLoader(source, trust_remote_code=options.trust_remote_code, device=device)
    tokenizer = read_tokenizer(source, trust_remote_code=options.trust_remote_code)
    longest = min(_DEFAULT_LENGTH, loader.max_positions or _DEFAULT_LENGTH)
    max_length = options.max_length or longest
    tokenized = tokenize(prompts, tokenizer, max_length)
    by_digest = {prompt_digest(ids): tuple(ids) for ids, _ in tokenized}
    notes = _count_notes(len(by_digest), len(prompts), options)
    cut = sum(is_cut for _, is_cut in tokenized)
    notes += [f"{cut} prompts are cut to {max_length} tokens"] if cut else []
    stack, why = _choose_stack(loader, options)
    if why:
        notes.append(f"the whole model is loaded: {why}")
    decisive = {
        "max_length": max_length,
        "batch_size": options.batch_size,
        "all_experts": options.all_experts,
        "until_converged": options.until_converged,
    }
    return Run(
        source,
        loader,
        stack,
        tuple(by_digest.values()),
        tuple(by_digest),
        tokenizer.pad_token_id or 0,
        decisive,
        output,
        options,
        tuple(notes),
    )


def _device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if text.partition(":")[0] not in ("cpu", "cuda"):
        raise RecipeError(f"--device {text!r} is not known: choose auto, cpu or cuda")
    if text.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError("--device cuda: torch sees no CUDA device here")
    try:
        return torch.device(text)
    except RuntimeError:
        raise RecipeError(f"--device {text!r} is not known: choose auto, cpu or cuda") from None


def _count_notes(count: int, loaded: int, options: CalibrateOptions) -> list[str]:
    notes = [f"{loaded - count} prompts came twice and are run once"] if loaded > count else []
    if loaded < options.num_prompts:
        notes.append(f"{options.prompts} holds {loaded} prompts, fewer than the {options.num_prompts} asked for")
    if not FEWEST_PROMPTS <= count <= MOST_PROMPTS:
        effect = (
            "scales may miss what the model really sees" if count < FEWEST_PROMPTS else "more rarely change a scale"
        )
        notes.append(f"{count} prompts: {FEWEST_PROMPTS} to {MOST_PROMPTS} are usual, {effect}")
    return notes


def _choose_stack(loader: ModelLoader, options: CalibrateOptions) -> tuple[Stack | None, str]:
    """The layers to be read one at a time; None for a resident run, and why, if that is not what was asked for."""
    if options.stream_layers not in STREAM_LAYERS:
        raise RecipeError(f"--stream-layers {options.stream_layers!r} is not known: choose {', '.join(STREAM_LAYERS)}")
    if options.stream_layers == "off":
        return None, ""
    if options.stream_layers == "auto" and 2 * loader.weight_nbytes <= _free_memory(loader.device):
        return None, ""
    if options.until_converged:
        if options.stream_layers == "on":
            raise RecipeError("--until-converged needs all layers of a prompt before the next: --stream-layers off")
        return None, "--until-converged runs prompt by prompt"
    found = find_stack(loader.model)
    if isinstance(found, str):
        return None, found
    path, layers = found
    loader.load(name for name in loader.model.state_dict() if not name.startswith(f"{path}."))
    ids = torch.ones((1, 4), dtype=torch.long, device=loader.device)
    stack = probe(path, layers, lambda: loader.model(input_ids=ids))
    return (None, stack) if isinstance(stack, str) else (stack, "")


def _free_memory(device: torch.device) -> int:
    """The bytes that a process can still take, of the device's memory or by the kernel's estimate of this machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
