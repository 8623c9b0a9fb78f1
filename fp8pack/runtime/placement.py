"""Where the bytes of tensors go: buffers of a device, and the reads that fill them. Pure values; nothing is read here.

What is contiguous in a file is contiguous in a buffer, so that fused weights stay one view and a read is long. A new
buffer begins where the file has a gap, where a tensor is cut, and where a tensor would not be aligned.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from fp8pack.checkpoint.digests import Crop, Expected, Piece
from fp8pack.modelfacts.spec import DTYPE_BITS, TensorSpec
from fp8pack.modelfacts.tensor_parallel import Part

READ_NBYTES = 8 << 20
_PAYLOAD_ALIGNMENT = 16  # of the operands of FP8 GEMMs, in bytes (cuBLAS documentation, cublasLtMatmul)


@dataclass(frozen=True, slots=True)
class BufferPlace:
    """Where bytes lie: a buffer, and an offset."""

    buffer: int
    offset: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Bytes of a read, from `begin` on, that go to a place; with `crop`, only some columns of them."""

    begin: int
    nbytes: int
    place: BufferPlace
    crop: Crop | None = None


@dataclass(frozen=True, slots=True)
class Proof:
    """A piece of a tensor whose digest is wanted, and where in the read it begins."""

    begin: int
    piece: Piece
    tensor: str


@dataclass(frozen=True, slots=True)
class Read:
    """One read of a file: what of it goes where, and what is digested."""

    file: str
    begin: int
    nbytes: int
    cuts: tuple[Cut, ...]
    proofs: tuple[Proof, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """The buffers, in bytes; the place of each tensor; and the reads that fill them, in the order of the files."""

    buffers: tuple[int, ...]
    places: Mapping[str, BufferPlace]
    reads: tuple[Read, ...]


def place(tensors: Iterable[tuple[TensorSpec, Part | None]], expected: Mapping[str, Expected]) -> Placement:
    """Return where tensors go.

    tensors: each with the part of it that is wanted, None for all. expected: what is digested, by name; that may be
        more than what is wanted.
    """
    runs: list[list[tuple[TensorSpec, Part | None]]] = []
    for spec, part in sorted(tensors, key=lambda item: (item[0].file, item[0].begin, item[0].end)):
        if runs and part is None and runs[-1][0][1] is None and _follows(spec, runs[-1][0][0], runs[-1][-1][0]):
            runs[-1].append((spec, part))
        else:
            runs.append([(spec, part)])
    buffers: list[int] = []
    places: dict[str, BufferPlace] = {}
    reads: list[Read] = []
    for i, run in enumerate(runs):
        (first, part), (last, _) = run[0], run[-1]
        for spec, _ in run:
            places[spec.name] = BufferPlace(i, spec.begin - first.begin)
        if part is None:
            buffers.append(last.end - first.begin)
            reads += _whole_reads([spec for spec, _ in run], i, expected)
        else:
            buffers.append(_nbytes(first, part))
            reads += _part_reads(first, part, i)
            reads += digest_reads(first.name, expected[first.name]) if first.name in expected else ()
    reads += [read for name, other in expected.items() if name not in places for read in digest_reads(name, other)]
    return Placement(tuple(buffers), places, tuple(reads))


def digest_reads(name: str, tensor: Expected) -> Iterator[Read]:
    """Yield the reads that only digest a tensor, under a name."""
    spec = tensor.spec
    for piece in tensor.pieces:
        yield Read(spec.file, spec.begin + piece.begin, piece.nbytes, (), (Proof(0, piece, name),))


def _whole_reads(run: list[TensorSpec], buffer: int, expected: Mapping[str, Expected]) -> Iterator[Read]:
    """Reads of tensors that follow each other, each of whole pieces where there are any."""
    begin = run[0].begin
    atoms: list[tuple[int, Proof | None]] = []  # bytes, and what is to be digested of them
    for spec in run:
        if spec.name in expected:
            atoms += ((piece.nbytes, Proof(spec.begin, piece, spec.name)) for piece in expected[spec.name].pieces)
        else:
            atoms += ((min(READ_NBYTES, spec.nbytes - at), None) for at in range(0, spec.nbytes, READ_NBYTES))
    for nbytes, proofs in _batches(atoms):
        cut = Cut(0, nbytes, BufferPlace(buffer, begin - run[0].begin))
        moved = (Proof(proof.begin + proof.piece.begin - begin, proof.piece, proof.tensor) for proof in proofs)
        yield Read(run[0].file, begin, nbytes, (cut,), tuple(moved))
        begin += nbytes


def _batches(atoms: list[tuple[int, Proof | None]]) -> Iterator[tuple[int, list[Proof]]]:
    total: int = 0
    proofs: list[Proof] = []
    for nbytes, proof in atoms:
        if total and total + nbytes > READ_NBYTES:
            yield total, proofs
            total, proofs = 0, []
        total += nbytes
        if proof is not None:
            proofs.append(proof)
    if total:
        yield total, proofs


def _part_reads(spec: TensorSpec, part: Part, buffer: int) -> Iterator[Read]:
    """Reads of the rows of a part, of whole rows where columns are cut away."""
    itemsize = DTYPE_BITS[spec.dtype] // 8
    row = itemsize * (spec.matrix[1] if len(spec.shape) > 1 else 1)
    left, right = (edge * itemsize for edge in part.cols)
    crop = None if right - left == row else Crop(row, left, right)
    step = READ_NBYTES if crop is None else max(1, READ_NBYTES // row) * row
    filled = 0
    for lo, hi in part.rows:
        for at in range(lo * row, hi * row, step):
            nbytes = min(step, hi * row - at)
            yield Read(spec.file, spec.begin + at, nbytes, (Cut(0, nbytes, BufferPlace(buffer, filled), crop),))
            filled += nbytes // row * (right - left) if crop else nbytes


def _follows(spec: TensorSpec, first: TensorSpec, last: TensorSpec) -> bool:
    """Whether a tensor can lie behind others as it does in the file."""
    alignment = _PAYLOAD_ALIGNMENT if spec.dtype in ("F8_E4M3", "F8_E5M2") else max(1, DTYPE_BITS[spec.dtype] // 8)
    return spec.file == last.file and spec.begin == last.end and (spec.begin - first.begin) % alignment == 0


def _nbytes(spec: TensorSpec, part: Part) -> int:
    rows, cols = part.shape
    return rows * cols * DTYPE_BITS[spec.dtype] // 8
