"""Headers that are malformed, unsafe or merely odd: each is refused with one sentence, or read as it stands."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hostile_headers import ACCEPTED, REFUSED, VALID, Build, packed, two
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fp8pack.checkpoint.header import Header, read_header
from fp8pack.errors import InputError


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], Header]:
    """Return a function that reads the header of a file with these bytes."""

    def read_bytes(content: bytes) -> Header:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        fd = os.open(path, os.O_RDONLY)
        try:
            return read_header(fd, path.name)
        finally:
            os.close(fd)

    return read_bytes


@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED.keys())
def test_malformed_header_is_refused_in_one_line(build: Build, read: Callable[[bytes], Header]) -> None:
    with pytest.raises(InputError) as caught:
        read(build())
    message = caught.value.command_line
    assert message.startswith("model.safetensors")
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert len(message) < 2000


@pytest.mark.parametrize("build", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_odd_but_well_formed_header_is_read(build: Build, read: Callable[[bytes], Header]) -> None:
    content = build()
    header = read(content)
    assert header.tensors[-1].end == len(content)
    assert len(safetensors.deserialize(content)) == len(header.tensors)


def test_a_damaged_length_prefix_says_how_many_bytes_the_file_has(read: Callable[[bytes], Header]) -> None:
    with pytest.raises(InputError, match="has 10 bytes but its header alone needs 11"):
        read(packed("{}", b"", length=3))


def test_a_git_lfs_pointer_is_refused_with_the_command_that_mends_it(read: Callable[[bytes], Header]) -> None:
    with pytest.raises(InputError, match="is a Git LFS pointer") as caught:
        read(REFUSED["git-lfs-pointer"]())
    assert caught.value.command_hint == "run `git lfs pull`"


@pytest.mark.parametrize("cut", [0, 7, 8, 9, 40, -5, -4, -3, -1])
def test_a_truncated_file_is_refused_wherever_it_ends(cut: int, read: Callable[[bytes], Header]) -> None:
    content = two((0, 4), (4, 8), 8)
    with pytest.raises(InputError):
        read(content[:cut])


EXAMPLES = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TOKENS = st.sampled_from(
    ['"', "{", "}", "[", "]", ",", ":", "-", "0", "1", "12", "1e9", "true", "null", "\\u0000", "\\ud800", '"a":', " "]
)


def check_agreement(content: bytes, read: Callable[[bytes], Header]) -> None:
    """The file is refused by an InputError of one line, or the safetensors library sees the same tensors in it."""
    try:
        header = read(content)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return
    seen = {name: (view["dtype"], tuple(view["shape"])) for name, view in safetensors.deserialize(content)}
    assert {spec.name: (spec.dtype, spec.shape) for spec in header.tensors} == seen


@EXAMPLES
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read_as_safetensors_reads_them(
    read: Callable[[bytes], Header], content: bytes
) -> None:
    check_agreement(content, read)


@pytest.mark.slow
@EXAMPLES
@given(st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), VALUES, max_size=3), st.integers(0, 16))
def test_random_json_is_refused_or_read_as_safetensors_reads_it(
    read: Callable[[bytes], Header], document: dict[str, Any], size: int
) -> None:
    check_agreement(packed(json.dumps(document), bytes(size)), read)


@EXAMPLES
@given(st.integers(0, len(VALID) - 17), st.integers(0, 12), st.lists(TOKENS, max_size=3))
@example(0, 0, [])
def test_a_spliced_header_is_refused_or_read_as_safetensors_reads_it(
    read: Callable[[bytes], Header], position: int, removed: int, added: list[str]
) -> None:
    raw = VALID[8:-16]
    begin = min(position, len(raw))
    check_agreement(packed(raw[:begin] + "".join(added).encode() + raw[begin + removed :], bytes(16)), read)


@pytest.mark.slow
@EXAMPLES
@given(st.integers(0, 8 * (len(VALID) - 16) - 1))
def test_a_flipped_bit_is_refused_or_read_as_safetensors_reads_it(read: Callable[[bytes], Header], bit: int) -> None:
    content = bytearray(VALID)
    content[bit // 8] ^= 1 << bit % 8
    check_agreement(bytes(content), read)


@pytest.mark.slow
@EXAMPLES
@given(
    st.sampled_from(["U8", "I16", "BF16", "F32", "F64", "F4", "F6_E2M3", "F8_E4M3", "C64", "X"]),
    st.lists(st.integers(0, 4) | st.sampled_from([2**32, 2**48, 2**63]), max_size=4),
    st.integers(0, 3),
    st.integers(0, 24),
)
def test_random_entries_are_refused_or_read_as_safetensors_reads_them(
    read: Callable[[bytes], Header], dtype: str, shape: list[int], begin: int, size: int
) -> None:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
    check_agreement(packed(json.dumps({"a": entry}), bytes(begin + size)), read)
