"""Opens a calibration run: checkpoint, prompts, device, and how layers are loaded."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from fp8pack.calibration.calibration_journal import CalibrationJournal
from fp8pack.calibration.cost_of_moments import cost_of_moments
from fp8pack.calibration.observers import observable, prompt_digest
from fp8pack.calibration.options import FEWEST_PROMPTS, MOST_PROMPTS, CalibrateOptions, moment_options
from fp8pack.checkpoint.source import Source, beside, open_checkpoint
from fp8pack.checkpoint.staging import Staging, check_output_file
from fp8pack.errors import InputError, RecipeError
from fp8pack.gemm.device import choose_device, free_memory
from fp8pack.modelfacts.patterns import ignoring_all
from fp8pack.modelfacts.roles import judge
from fp8pack.modelrun.loader import ModelLoader, read_tokenizer
from fp8pack.modelrun.prompts import load_prompts, tokenize
from fp8pack.modelrun.stream_layers import Stack, open_stack, return_memory_at_once


@dataclass(frozen=True, slots=True)
class Run:
    """A calibration run before its first token."""

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
        """The journal's head: an unfinished calibration with an equal head is continued."""
        prompts = blake3("".join(self.digests).encode()).hexdigest()
        head = {"fingerprint": self.source.fingerprint, "prompts": prompts, "options": self.decisive}
        return {**head, "streamed": self.stack is not None}

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.ids))

    def batches(self) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Yield the number of tokens and the arguments of each call, padded on the right if lengths differ."""
        for start in range(0, len(self.ids), self.options.batch_size):
            rows = self.ids[start : start + self.options.batch_size]
            length = max(map(len, rows))
            padded = [[*row, *[self.pad] * (length - len(row))] for row in rows]
            call = {"input_ids": torch.tensor(padded, device=self.loader.device)}
            if any(len(row) < length for row in rows):
                mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
                call["attention_mask"] = torch.tensor(mask, device=self.loader.device)
            yield sum(map(len, rows)), call


def open_run(model: Path, options: CalibrateOptions) -> Run:
    """Open the checkpoint, read the prompts and decide how to run; raises as `calibrate` does."""
    source = open_checkpoint(model)
    output = Path(os.path.abspath(options.output or beside(source, f"{source.name}-calibration.safetensors")))
    if output.suffix != ".safetensors":
        raise RecipeError(
            f"the output {output.name} is not a .safetensors file", f"-o {shlex.quote(output.name + '.safetensors')}"
        )
    check_output_file(output, source.path, overwrite=options.overwrite)
    prompts = load_prompts(options.prompts, options.num_prompts, text_column=options.text_column)
    if not prompts:
        raise InputError(f"{', '.join(options.prompts)} has no prompt")
    device = choose_device(options.device)
    if options.stream_layers == "on":
        return_memory_at_once()
    loader = ModelLoader(source, trust_remote_code=options.trust_remote_code, device=device)
    if loader.model.config.is_encoder_decoder:
        raise InputError(
            f"{source.facts.architecture} is an encoder-decoder, which needs more input than a prompt",
            "run it in your own loop inside `with fp8pack.observe(model)`",
        )
    for config in (loader.model.config, loader.model.config.get_text_config()):
        config.use_cache = False
    tokenizer = read_tokenizer(source, trust_remote_code=options.trust_remote_code)
    max_length = loader.length(options.max_length)
    tokenized = dict(zip((prompt.name for prompt in prompts), tokenize(prompts, tokenizer, max_length), strict=True))
    loader.check_tokens({name: ids for name, (ids, _) in tokenized.items()})
    by_digest = {prompt_digest(ids): (tuple(ids), is_cut) for ids, is_cut in tokenized.values()}
    notes = _count_notes(len(by_digest), len(prompts), options)
    if conversations := sum(not isinstance(prompt.content, str) for prompt in prompts):
        if tokenizer.chat_template:
            notes.append(f"{conversations} conversations are rendered with the tokenizer's chat template")
        else:
            notes.append(f"{conversations} conversations are run as plain text: the tokenizer has no chat template")
    if cut := sum(is_cut for _, is_cut in by_digest.values()):
        notes.append(f"{cut} prompts are truncated to {max_length} tokens")
    seen = observable(loader.model, loader.names)
    notes += _unseen_notes(source, seen)
    if options.second_moments != "none":
        num_tokens = sum(len(ids) for ids, _ in by_digest.values())
        per_token = int(loader.model.config.get_text_config().to_dict().get("num_experts_per_tok") or 1)
        notes.append(cost_of_moments(source, seen, options.second_moments, num_tokens, per_token))
    stack, why = _choose_stack(loader, options, _was_streamed(source, output, options))
    if why:
        notes.append(f"the whole model is loaded, not one layer at a time: {why}")
    decisive = {
        "max_length": max_length,
        "batch_size": options.batch_size,
        "all_experts": options.all_experts,
        "until_converged": options.until_converged,
        **moment_options(options.second_moments),
    }
    return Run(
        source=source,
        loader=loader,
        stack=stack,
        ids=tuple(ids for ids, _ in by_digest.values()),
        digests=tuple(by_digest),
        pad=tokenizer.pad_token_id or 0,
        decisive=decisive,
        output=output,
        options=options,
        notes=tuple(notes),
    )


def _count_notes(count: int, loaded: int, options: CalibrateOptions) -> list[str]:
    notes = [f"{loaded - count} duplicate prompts are skipped"] if loaded > count else []
    if loaded < options.num_prompts:
        notes.append(f"{', '.join(options.prompts)} has {loaded} prompts, fewer than {options.num_prompts}")
    if not FEWEST_PROMPTS <= count <= MOST_PROMPTS:
        effect = "fewer may miss large activations" if count < FEWEST_PROMPTS else "more rarely change a scale"
        notes.append(f"{count} prompts: use {FEWEST_PROMPTS} to {MOST_PROMPTS}, {effect}")
    return notes


def _unseen_notes(source: Source, seen: set[str]) -> list[str]:
    """The note on weights that pack would quantize and whose input activations cannot be recorded."""
    unseen = [
        spec.name
        for spec in source.specs
        if ((verdict := judge(spec, source.facts)).packed or verdict.role == "experts")
        and spec.name.removesuffix(".weight") not in seen
    ]
    if not unseen:
        return []
    what = f"input activations of {len(unseen)} weights cannot be recorded, such as {unseen[0]}"
    return [f"{what}: `pack --scheme FP8` needs {ignoring_all(unseen)}; FP8_DYNAMIC packs them"]


def _was_streamed(source: Source, output: Path, options: CalibrateOptions) -> bool | None:
    """Whether an unfinished run of this model streamed layers, which `auto` continues; None if there is none."""
    head = CalibrationJournal(Staging(output).journal).head() if options.resume else {}
    return head.get("streamed") if head.get("fingerprint") == source.fingerprint else None


def _choose_stack(
    loader: ModelLoader, options: CalibrateOptions, was_streamed: bool | None
) -> tuple[Stack | None, str]:
    """The layers to load one at a time; None for a resident run, with the reason if streaming was requested."""
    if options.stream_layers == "off":
        return None, ""
    if options.stream_layers == "auto":
        large = 2 * loader.weight_nbytes > free_memory(loader.device)
        if not (large if was_streamed is None else was_streamed):
            return None, ""
    if options.until_converged:
        if options.stream_layers == "on":
            raise RecipeError(
                "until converged needs every layer for each prompt, so layers cannot be streamed", "--stream-layers off"
            )
        return None, "a run until converged needs every layer for each prompt"
    stack = open_stack(
        loader.model, loader.load, loader.device, least_share=0.5 if options.stream_layers == "auto" else 0
    )
    return (None, stack) if isinstance(stack, str) else (stack, "")
