"""`evaluate_encoder`: what quantization cost a model that embeds or classifies texts."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8pack.bounds import Bound, parse_bounds
from fp8pack.checkpoint.source import Source
from fp8pack.errors import BoundError, InputError, RecipeError, VerificationError
from fp8pack.evaluation.encoder_evaluation import EncoderEvaluation, EncoderQuality, WorstText
from fp8pack.evaluation.intervals import Bootstrap, Interval
from fp8pack.evaluation.models import Opened, open_packed, open_source
from fp8pack.evaluation.options import FAIL_ON, EvalOptions
from fp8pack.evaluation.pooling import Pool, read_pooling
from fp8pack.evaluation.progress import OnProgress
from fp8pack.gemm.device import choose_device
from fp8pack.inputs import Paths, Texts, parse_choice, parse_path, parse_paths
from fp8pack.modelfacts.spec import TORCH_NAMES
from fp8pack.modelrun.chat import Prompt
from fp8pack.modelrun.loader import quiet_transformers, read_tokenizer
from fp8pack.modelrun.prompts import HELD_OUT, load_prompts, tokenize
from fp8pack.numerics.torch_dtypes import TORCH_DTYPES

METRICS = ("cosine", "cosine_min", "rank_correlation", "neighbours", "agreement", "kl")
EMBEDDINGS, CLASSES = "embeddings", "classes"
_MOST_DOCUMENTS = 100_000
_MOST_TEXTS = 4096  # of which all pairs are compared
_WORST = 10
_LENGTH = 256
_SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\n+")
_SHORTEST = 12  # characters of a text

Floats = NDArray[np.float64]
Encode = Callable[[Tensor], Tensor]  # tokens [T] to an embedding [H] or logits of labels [C]


def kind_of(source: Source) -> str:
    """Return `embeddings` or `classes` if a model is known to give those, else an empty text."""
    name = source.facts.architecture
    if name.endswith("ForSequenceClassification"):
        return CLASSES
    has_modules = (source.directory / "modules.json").is_file()
    is_encoder = name.endswith(("Model", "ForMaskedLM", "ForPreTraining")) and not (source.config or {}).get(
        "is_encoder_decoder"
    )
    return EMBEDDINGS if has_modules or is_encoder else ""


def evaluate_encoder(  # noqa: PLR0913
    checkpoints: Paths,
    against: str | Path,
    *,
    text: Texts = HELD_OUT,
    text_column: str | None = None,
    num_tokens: int | None = None,
    max_length: int | None = None,
    activations: str = "declared",
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    fail_if: Texts = (),
    fail_on: str = "interval",
    on_progress: OnProgress | None = None,
) -> EncoderEvaluation:
    """Run checkpoints of an encoder and their source over the same texts, and compare embeddings or labels.

    Embeddings are pooled as modules.json of a sentence-transformers model says, or are the mean of all tokens; models
    called …ForSequenceClassification are compared by their labels. Texts are the sentences or lines of the documents.
    checkpoints, against, text, num_tokens, activations, dtype, device: as in `evaluate`. max_length: tokens of a text;
        256 by default. fail_if: bounds on cosine, cosine_min, rank_correlation and neighbours, or agreement and kl.

    Raises:
        InputError: a checkpoint or a text is refused, or the model is no encoder. RecipeError: an option is out of
            range. VerificationError: an output is a NaN or infinity. BoundError: a bound is broken.
    """
    options = EvalOptions(
        text=text,
        text_column=text_column,
        num_tokens=num_tokens,
        max_length=max_length,
        activations=activations,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    bounds, found_on = parse_bounds(fail_if, METRICS), parse_choice("fail_on", fail_on, FAIL_ON)
    found = run_encoders(parse_paths("checkpoints", checkpoints), parse_path("against", against), options, on_progress)
    check_bounds(found, bounds, found_on)
    return found


def run_encoders(
    checkpoints: Sequence[Path], against: Path, options: EvalOptions, on_progress: OnProgress | None = None
) -> EncoderEvaluation:
    """Return what `evaluate_encoder` does, without checking bounds."""
    if options.base or options.save_base or options.state or options.stream_layers == "on":
        raise RecipeError("an encoder is run whole, without a state", "leave out streaming, base and state")
    with quiet_transformers(), torch.no_grad():
        return _evaluate(checkpoints, against, options, on_progress or (lambda done, total: None))


def check_bounds(found: EncoderEvaluation, bounds: Sequence[Bound], fail_on: str) -> None:
    """Raise BoundError for the first bound that is broken; RecipeError if its metric was not measured."""
    for quality in found.checkpoints:
        for bound in bounds:
            measured: Interval | float | None = getattr(quality, bound.metric)
            if measured is None:
                raise RecipeError(f"{bound.metric} is not measured of {found.kind}", f"choose {' or '.join(METRICS)}")
            value = measured
            if isinstance(measured, Interval):
                end = measured.high if bound.is_upper else measured.low
                value = measured.value if fail_on == "point" else end
            if bound.is_broken_by(float(value)):  # type: ignore[arg-type]
                raise BoundError(
                    f"{bound.metric} of {quality.checkpoint} is {value:.6g}, which is {bound.sign} {bound.value:g}; "
                    f"the worst text is {quality.worst[0].text!r}"
                )


def _evaluate(
    checkpoints: Sequence[Path], against: Path, options: EvalOptions, on_progress: OnProgress
) -> EncoderEvaluation:
    started, device = time.monotonic(), choose_device(options.device)
    dtype, trust = TORCH_DTYPES[TORCH_NAMES[options.dtype]], options.trust_remote_code
    base = open_source(against, dtype, device, trust_remote_code=trust)
    kind = kind_of(base.source)
    if not kind:
        raise InputError(f"{base.source.facts.architecture or against} is no encoder that is known", "use evaluate")
    tokenizer = read_tokenizer(base.source, trust_remote_code=trust)
    length = options.max_length or min(_LENGTH, base.loader.length(None))
    names, texts, lengths = _texts(options)
    ids = [torch.tensor(found, device=device) for found, _ in tokenize(texts, tokenizer, length)]
    base.loader.check_tokens({text.name: found.tolist() for text, found in zip(texts, ids, strict=True)})
    others = [open_packed(path, dtype, device, options.activations, trust_remote_code=trust) for path in checkpoints]
    models, total = [base, *others], sum(map(len, ids)) * (len(others) + 1)
    pooling, outputs, done = "", [], 0
    for opened in models:
        opened.load(list(opened.model.state_dict()))
        encode, pooling = _encoder(opened, kind, device)
        rows = []
        for found in ids:
            rows.append(encode(found).double().cpu().numpy())
            done += len(found)
            on_progress(done, total)
        outputs.append(np.stack(rows))
        if not np.isfinite(outputs[-1]).all():
            raise VerificationError(
                f"{opened.path}: an output is not a finite number", "`fp8pack inspect` looks for it"
            )
    bootstrap, said = Bootstrap(lengths), [str(text.content) for text in texts]
    compare = _compare_embeddings if kind == EMBEDDINGS else _compare_classes
    return EncoderEvaluation(
        source=against,
        kind=kind,
        pooling=pooling,
        text=options.text,
        num_documents=len(names),
        num_texts=len(texts),
        num_tokens=sum(map(len, ids)),
        dtype=options.dtype,
        checkpoints=tuple(
            compare(opened, outputs[0], other, bootstrap, said)
            for opened, other in zip(others, outputs[1:], strict=True)
        ),
        notes=tuple(note for opened in others for note in opened.notes),
        seconds=time.monotonic() - started,
    )


def _texts(options: EvalOptions) -> tuple[list[str], list[Prompt], list[int]]:
    """The documents by name, their sentences or lines, and how many each document has."""
    names: list[str] = []
    texts: list[Prompt] = []
    lengths: list[int] = []
    characters = 0
    for document in load_prompts(options.text, _MOST_DOCUMENTS, text_column=options.text_column):
        content = document.content
        whole = content if isinstance(content, str) else "\n".join(str(turn.get("content", "")) for turn in content)
        pieces = [piece.strip() for piece in _SENTENCES.split(whole) if len(piece.strip()) >= _SHORTEST]
        found: list[Prompt] = []
        for piece in pieces:
            if len(texts) + len(found) >= _MOST_TEXTS or characters > 4 * options.num_tokens:
                break
            found.append(Prompt(f"{document.name}, text {len(found) + 1}", piece))
            characters += len(piece)
        if found:
            names.append(document.name)
            texts += found
            lengths.append(len(found))
    if len(texts) < 3:
        raise InputError(f"{', '.join(options.text)} has fewer than three sentences or lines")
    return names, texts, lengths


def _encoder(opened: Opened, kind: str, device: torch.device) -> tuple[Encode, str]:
    """The function that encodes tokens, and how it pools."""
    if kind == CLASSES:
        return lambda ids: opened.model(input_ids=ids[None]).logits[0], ""
    pool: Pool
    pool, name = read_pooling(opened.source.directory, device)
    body = opened.model.base_model
    return lambda ids: pool(body(input_ids=ids[None]).last_hidden_state[0].float()), name


def _compare_embeddings(
    opened: Opened, base: Floats, other: Floats, bootstrap: Bootstrap, texts: Sequence[str]
) -> EncoderQuality:
    ours, theirs = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (base, other))
    cosine = (ours * theirs).sum(1)
    similar, also = ours @ ours.T, theirs @ theirs.T
    pairs = np.triu_indices(len(texts), 1)
    for matrix in (similar, also):
        np.fill_diagonal(matrix, -np.inf)  # a text is no neighbour of itself
    same = (similar.argmax(1) == also.argmax(1)).astype(np.float64)
    return EncoderQuality(
        checkpoint=opened.path,
        activations=opened.activations,
        cosine=bootstrap.mean(cosine),
        cosine_min=float(cosine.min()),
        rank_correlation=spearman(similar[pairs], also[pairs]),
        neighbours=bootstrap.mean(same),
        agreement=None,
        kl=None,
        worst=tuple(_worst(texts, cosine, cosine)),
    )


def _compare_classes(
    opened: Opened, base: Floats, other: Floats, bootstrap: Bootstrap, texts: Sequence[str]
) -> EncoderQuality:
    p, q = (torch.log_softmax(torch.from_numpy(rows), 1) for rows in (base, other))
    kl = (p.exp() * (p - q)).sum(1).numpy()
    same = (base.argmax(1) == other.argmax(1)).astype(np.float64)
    return EncoderQuality(
        checkpoint=opened.path,
        activations=opened.activations,
        cosine=None,
        cosine_min=None,
        rank_correlation=None,
        neighbours=None,
        agreement=bootstrap.mean(same),
        kl=bootstrap.mean(kl),
        worst=tuple(_worst(texts, kl, -kl)),
    )


def spearman(a: Floats, b: Floats) -> float:
    """Return the rank correlation of two lists of numbers; equal ones share their mean rank."""
    x, y = (_ranks(values) - (len(values) - 1) / 2 for values in (a, b))
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else 1.0


def _ranks(values: Floats) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts + 1) / 2)[place])


def _worst(texts: Sequence[str], values: Floats, order: Floats) -> Iterator[WorstText]:
    for i in np.argsort(order, kind="stable")[:_WORST]:
        yield WorstText(texts[i], float(values[i]))
