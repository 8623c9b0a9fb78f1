"""Every target of `make fuzz`, over its corpus and 300 damaged copies of each input."""

import random

import pytest
from fuzz.make_corpus import make_corpus
from fuzz.targets import TARGETS

CORPUS = make_corpus()


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_accepted_or_refused_in_a_sentence(name: str) -> None:
    chance = random.Random(7)
    for seed in CORPUS[name]:
        TARGETS[name](seed)
        for _ in range(300):
            data = bytearray(seed)
            for _ in range(chance.randint(1, 4)):
                begin = chance.randrange(len(data))
                kind = chance.randrange(4)
                if kind == 0:
                    data[begin] ^= 1 << chance.randrange(8)
                elif kind == 1:
                    del data[begin : begin + chance.randrange(1, 9)]
                elif kind == 2:
                    data[begin:begin] = chance.choice(
                        [b"[", b"{", b'"', b"\\u0000", b"9" * 30, b"-1", b"null", b"\xff"]
                    )
                else:
                    data[begin : begin + 4] = data[chance.randrange(len(data)) :][:4]
                data = data or bytearray(b"{")
            TARGETS[name](bytes(data))
