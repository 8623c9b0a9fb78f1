"""Safetensors files that are malformed, unsafe or merely odd, for every reader: REFUSED, and ACCEPTED."""

import json
import struct
from collections.abc import Callable

ENTRY = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
DATA = b"\x01\x02\x03\x04"
MANY = 20_000

Build = Callable[[], bytes]


def packed(header: str | bytes, data: bytes = DATA, *, length: int | None = None) -> bytes:
    """Return a file with this header text and data; `length` lies about the header."""
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(dtype: str = '"U8"', shape: str = "[4]", offsets: str = "[0,4]", *, data: bytes = DATA) -> bytes:
    """Return a file of one tensor whose fields are given as JSON text."""
    return packed(f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}', data)


def two(first: tuple[int, int], second: tuple[int, int], size: int) -> bytes:
    """Return a file of two U8 tensors with these offsets."""
    entries = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in (("a", first), ("b", second))
    }
    return packed(json.dumps(entries), bytes(size))


def named(text: str) -> bytes:
    """Return a file of one tensor whose name is given as the inside of a JSON string."""
    return packed(f'{{"{text}":{ENTRY}}}')


def with_metadata(text: str) -> bytes:
    """Return a file whose `__metadata__` is this JSON text."""
    return packed(f'{{"__metadata__":{text},"a":{ENTRY}}}')


def with_extra(text: str) -> bytes:
    """Return a file whose tensor has one more field, whose value is this JSON text."""
    return packed(f'{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":{text}}}}}')


def crowd(count: int, *, last_twice: bool = False) -> bytes:
    """Return a file of many tensors of one element."""
    parts = [f'"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(count)]
    parts += parts[-1:] if last_twice else []
    return packed("{" + ",".join(parts) + "}", bytes(count))


REFUSED: dict[str, Build] = {
    "01-empty-file": lambda: b"",
    "02-seven-bytes": lambda: b"1234567",
    "03-length-zero": lambda: packed(b"", b"", length=0),
    "04-length-2-to-the-64": lambda: packed("{}", b"", length=2**64 - 1),
    "05-length-over-100-MB": lambda: packed("{}", b"", length=100_000_001),
    "06-length-past-the-end": lambda: packed("{}", b"", length=3),
    "07-array": lambda: packed("[]", b""),
    "08-null": lambda: packed("null", b""),
    "09-NaN": lambda: packed("NaN", b""),
    "09-NaN-in-a-field": lambda: with_extra("NaN"),
    "09-Infinity-in-a-field": lambda: with_extra("-Infinity"),
    "11-byte-order-mark": lambda: packed(b"\xef\xbb\xbf" + f'{{"a":{ENTRY}}}'.encode()),
    "12-utf-16": lambda: packed(f'{{"a":{ENTRY}}}'.encode("utf-16")),
    "13-padded-with-nul": lambda: packed(f'{{"a":{ENTRY}}}\0\0\0'),
    "14-two-documents": lambda: packed(f'{{"a":{ENTRY}}}{{}}'),
    "15-invalid-utf-8": lambda: packed(b'{"\xff":' + ENTRY.encode() + b"}"),
    "15-overlong-utf-8": lambda: packed(b'{"\xc0\xaf":' + ENTRY.encode() + b"}"),
    "16-lone-surrogate-in-a-name": lambda: named("\\ud800"),
    "16-lone-surrogate-in-metadata": lambda: with_metadata('{"\\udc00":"x"}'),
    "16-lone-surrogate-in-an-extra-field": lambda: with_extra('"\\ud800"'),
    "17-name-twice-equal": lambda: packed(f'{{"a":{ENTRY},"a":{ENTRY}}}'),
    "17-name-twice-escaped": lambda: packed(f'{{"a":{ENTRY},"\\u0061":{ENTRY}}}'),
    "17-last-of-many-names-twice": lambda: crowd(5 * MANY, last_twice=True),
    "18-name-twice-other-dtype": lambda: packed(f'{{"a":{ENTRY.replace("U8", "I8")},"a":{ENTRY}}}'),
    "19-field-twice": lambda: packed(f'{{"a":{{"dtype":"I8",{ENTRY[1:]}}}'),
    "20-metadata-twice": lambda: packed(f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{ENTRY}}}'),
    "21-metadata-key-twice": lambda: with_metadata('{"k":"1","k":"2"}'),
    "22-metadata-value-number": lambda: with_metadata('{"k":1}'),
    "22-metadata-value-null": lambda: with_metadata('{"k":null}'),
    "24-metadata-list": lambda: with_metadata("[]"),
    "24-metadata-text": lambda: with_metadata('"text"'),
    "25-unknown-dtype": lambda: one(dtype='"BF17"'),
    "25-dtype-null": lambda: one(dtype="null"),
    "25-dtype-list": lambda: one(dtype='["U8"]'),
    "26-lower-case-dtype": lambda: one(dtype='"u8"'),
    "27-negative-dim": lambda: one(shape="[-4]"),
    "27-two-negative-dims": lambda: one(shape="[-2,-2]"),
    "28-float-dim": lambda: one(shape="[4.0]"),
    "28-exponent-dim": lambda: one(shape="[4e0]"),
    "28-minus-zero-dim": lambda: one(shape="[-0]", offsets="[0,0]", data=b""),
    "29-string-dim": lambda: one(shape='["4"]'),
    "30-boolean-dim": lambda: one(shape="[4,true]"),
    "31-product-overflows": lambda: one(shape="[4294967296,4294967296]"),
    "31-product-overflows-to-four": lambda: one(shape="[4611686018427387905,4]"),
    "32-overflow-before-zero-dim": lambda: one(shape="[281474976710656,281474976710656,0]", offsets="[0,0]", data=b""),
    "33-zero-dim-before-a-huge-dim": lambda: one(shape="[0,18446744073709551615]", offsets="[0,0]", data=b""),
    "34-dim-of-2-to-the-64": lambda: one(shape="[18446744073709551616]"),
    "34-dim-of-5000-digits": lambda: one(shape=f"[{'9' * 5000}]"),
    "34-offset-of-4000-digits": lambda: one(offsets=f"[0,{'9' * 4000}]"),
    "35-rank-100000": lambda: one(shape="[4" + ",1" * 99_999 + "]"),
    "35-rank-65": lambda: one(shape="[4" + ",1" * 64 + "]"),
    "36-size-is-not-that-of-the-shape": lambda: one(shape="[3]"),
    "36-size-is-not-that-of-the-dtype": lambda: one(dtype='"BF16"'),
    "37-begin-after-end": lambda: one(offsets="[4,0]"),
    "38-end-past-the-file": lambda: one(shape="[8]", offsets="[0,8]"),
    "39-trailing-bytes": lambda: one(data=DATA + b"\0"),
    "40-hole-at-the-start": lambda: two((1, 3), (3, 5), 5),
    "41-hole-between": lambda: two((0, 2), (3, 5), 5),
    "42-overlap": lambda: two((0, 3), (2, 5), 5),
    "43-the-same-range-twice": lambda: two((0, 4), (0, 4), 4),
    "45-three-offsets": lambda: one(offsets="[0,2,4]"),
    "46-one-offset": lambda: one(offsets="[4]"),
    "47-negative-offset": lambda: one(offsets="[-4,0]"),
    "47-boolean-offset": lambda: one(shape="[1]", offsets="[false,true]", data=b"\0"),
    "48-no-dtype": lambda: packed('{"a":{"shape":[4],"data_offsets":[0,4]}}'),
    "48-no-shape": lambda: packed('{"a":{"dtype":"U8","data_offsets":[0,4]}}'),
    "48-no-offsets": lambda: packed('{"a":{"dtype":"U8","shape":[4]}}'),
    "48-empty-entry": lambda: packed('{"a":{}}', b""),
    "50-entry-as-array": lambda: packed('{"a":["U8",[4],[0,4]]}'),
    "50-entry-as-text": lambda: packed('{"a":"dtype shape data_offsets"}', b""),
    "51-empty-name": lambda: named(""),
    "52-nul-in-a-name": lambda: named("a\\u0000b"),
    "52-newline-in-a-name": lambda: named("a\\nb"),
    "52-escape-in-a-name": lambda: named("\\u001b[2J"),
    "52-delete-in-a-name": lambda: named("a\\u007f"),
    "52-C1-escape-in-a-name": lambda: named("\\u009b2J"),
    "52-control-character-unescaped": lambda: named("a\x01b"),
    "54-nested-200-deep-in-a-field": lambda: with_extra("[" * 200 + "]" * 200),
    "54-nested-200-deep-in-a-shape": lambda: one(shape="[" * 200 + "]" * 200),
    "54-nested-200-deep-at-the-top": lambda: packed('{"a":' * 200 + "1" + "}" * 200),
    "54-nested-100000-deep": lambda: packed("[" * 100_000),
    "55-odd-count-of-F4": lambda: one(dtype='"F4"', shape="[7]"),
    "55-F6-that-fills-no-byte": lambda: one(dtype='"F6_E2M3"', shape="[5]"),
    "60-two-million-tensors-are-over-100-MB": lambda: packed("{}", b"", length=120_000_000),
    "61-name-of-10-MB": lambda: named("n" * 10_000_000),
    "61-name-of-10-MB-twice": lambda: packed(f'{{"{"n" * 5_000_000}":{ENTRY},"{"n" * 5_000_000}":{ENTRY}}}'),
    "number-too-large-for-a-double": lambda: with_extra("1e400"),
    "git-lfs-pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "gzip": lambda: b"\x1f\x8b\x08\x00" + bytes(60),
    "html-error-page": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
    "gguf": lambda: b"GGUF" + bytes(60),
    "pickle-in-a-zip": lambda: b"PK\x03\x04" + bytes(60),
}

ACCEPTED: dict[str, Build] = {
    "10-leading-spaces": lambda: packed(f'   {{"a":{ENTRY}}}'),
    "10-trailing-spaces": lambda: packed(f'{{"a":{ENTRY}}}   '),
    "23-metadata-null": lambda: with_metadata("null"),
    "35-rank-64": lambda: one(shape="[4" + ",1" * 63 + "]"),
    "35-rank-0": lambda: one(shape="[]", offsets="[0,1]", data=b"\0"),
    "44-empty-tensors-at-one-offset": lambda: packed(
        json.dumps(
            {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in "xyz"} | {"a": json.loads(ENTRY)}
        )
    ),
    "49-extra-field": lambda: with_extra("[1,2]"),
    "53-name-like-a-path": lambda: named("../../etc/passwd"),
    "56-FNUZ": lambda: one(dtype='"F8_E4M3FNUZ"'),
    "57-unaligned-F32": lambda: packed(
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}',
        bytes(5),
    ),
    "58-boolean-byte-of-7": lambda: one(dtype='"BOOL"', shape="[1]", offsets="[0,1]", data=b"\x07"),
    "59-100-MB-of-whitespace": lambda: packed(f'{{"a":{ENTRY}}}'.encode().ljust(100_000_000)),
    "60-twenty-thousand-tensors": lambda: crowd(MANY),
    "62-names-equal-after-normalization": lambda: packed(
        '{"\u00e9":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        '"e\u0301":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}'
    ),
}

VALID = packed(
    '{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
    '"b":{"dtype":"F32","shape":[],"data_offsets":[12,16]},"c":{"dtype":"U8","shape":[0],"data_offsets":[16,16]}}',
    bytes(16),
)
