"""Which bytes go where: buffers of a device, and the reads that fill them. Values only; nothing is read here.

Tensors that are adjacent in a file are adjacent in a buffer, so that fused weights are one view and reads are long. A
new buffer begins at a gap in the file, at a tensor that is cut, and at a tensor that would not be aligned.
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
    """The place of bytes: a buffer, and an offset."""

    buffer: int
    offset: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Bytes of a read from `begin` on that are copied to a place; with `crop`, only some columns."""

    begin: int
    nbytes: int
    place: BufferPlace
    crop: Crop | None = None


@dataclass(frozen=True, slots=True)
class Proof:
    """A piece of a tensor to digest, and where it begins in the read."""

    begin: int
    piece: Piece
    tensor: str


@dataclass(frozen=True, slots=True)
class Read:
    """One read of a file, the copies of its bytes, and the pieces to digest."""

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


def place(
    tensors: Iterable[tuple[TensorSpec, Part | None]],
    expected: Mapping[str, Expected],
    read_nbytes: int = READ_NBYTES,
) -> Placement:
    """Return the places and reads of tensors.

    tensors: each with the part to load, None for all of it. expected: what to digest, by name; may include tensors that
        are not loaded. read_nbytes: the most that is read at once, but for one row or piece.
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
            reads += _whole_reads([spec for spec, _ in run], i, expected, read_nbytes)
        else:
            buffers.append(_nbytes(first, part))
            reads += _part_reads(first, part, i, read_nbytes)
            reads += digest_reads(first.name, expected[first.name]) if first.name in expected else ()
    reads += [read for name, other in expected.items() if name not in places for read in digest_reads(name, other)]
    return Placement(tuple(buffers), places, tuple(reads))


def digest_reads(name: str, tensor: Expected) -> Iterator[Read]:
    """Yield reads that only digest a tensor, which is reported by this name."""
    spec = tensor.spec
    for piece in tensor.pieces:
        yield Read(spec.file, spec.begin + piece.begin, piece.nbytes, (), (Proof(0, piece, name),))


def _whole_reads(
    run: list[TensorSpec], buffer: int, expected: Mapping[str, Expected], read_nbytes: int
) -> Iterator[Read]:
    """Reads of adjacent tensors, each of whole pieces if they are digested."""
    begin = run[0].begin
    atoms: list[tuple[int, Proof | None]] = []  # bytes, and the piece to digest
    for spec in run:
        if spec.name in expected:
            atoms += ((piece.nbytes, Proof(spec.begin, piece, spec.name)) for piece in expected[spec.name].pieces)
        else:
            atoms += ((min(read_nbytes, spec.nbytes - at), None) for at in range(0, spec.nbytes, read_nbytes))
    for nbytes, proofs in _batches(atoms, read_nbytes):
        cut = Cut(0, nbytes, BufferPlace(buffer, begin - run[0].begin))
        moved = (Proof(proof.begin + proof.piece.begin - begin, proof.piece, proof.tensor) for proof in proofs)
        yield Read(run[0].file, begin, nbytes, (cut,), tuple(moved))
        begin += nbytes


def _batches(atoms: list[tuple[int, Proof | None]], read_nbytes: int) -> Iterator[tuple[int, list[Proof]]]:
    total: int = 0
    proofs: list[Proof] = []
    for nbytes, proof in atoms:
        if total and total + nbytes > read_nbytes:
            yield total, proofs
            total, proofs = 0, []
        total += nbytes
        if proof is not None:
            proofs.append(proof)
    if total:
        yield total, proofs


def _part_reads(spec: TensorSpec, part: Part, buffer: int, read_nbytes: int) -> Iterator[Read]:
    """Reads of the rows of a part; whole rows if columns are cut off."""
    itemsize = DTYPE_BITS[spec.dtype] // 8
    row = itemsize * (spec.matrix[1] if len(spec.shape) > 1 else 1)
    left, right = (edge * itemsize for edge in part.cols)
    crop = None if right - left == row else Crop(row, left, right)
    step = read_nbytes if crop is None else max(1, read_nbytes // row) * row
    filled = 0
    for lo, hi in part.rows:
        for at in range(lo * row, hi * row, step):
            nbytes = min(step, hi * row - at)
            yield Read(spec.file, spec.begin + at, nbytes, (Cut(0, nbytes, BufferPlace(buffer, filled), crop),))
            filled += nbytes // row * (right - left) if crop else nbytes


def _follows(spec: TensorSpec, first: TensorSpec, last: TensorSpec) -> bool:
    """Whether a tensor is adjacent to the last in the file, and aligned in the buffer."""
    alignment = _PAYLOAD_ALIGNMENT if spec.dtype in ("F8_E4M3", "F8_E5M2") else max(1, DTYPE_BITS[spec.dtype] // 8)
    return spec.file == last.file and spec.begin == last.end and (spec.begin - first.begin) % alignment == 0


def _nbytes(spec: TensorSpec, part: Part) -> int:
    rows, cols = part.shape
    return rows * cols * DTYPE_BITS[spec.dtype] // 8
