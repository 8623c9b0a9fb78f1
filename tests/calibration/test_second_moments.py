"""Second moments of a calibration: X^T X of every input, once for modules that share it, in every kind of run."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration.test_observe import recorded
from calibration.tiny_models import TEXTS, make_model, make_tokenizer, write_prompts
from checkpoints import DEMO
from numpy.typing import NDArray
from torch import nn

import fp8pack
from fp8pack.calibration.recorder import Rows, Threads
from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.errors import DeadlineError, InputError
from fp8pack.numerics.second_moments import block_of, matrices_of, triangles_of
from fp8pack.planning.calibration import Calibration, Site, is_gemm_input

KINDS = ("blocks", "full")


def moments_of(site: Site) -> NDArray[np.float64]:
    """The moments of a site [K, K], zeros outside of its blocks."""
    assert site.moments is not None
    blocks, channels = matrices_of(site.moments.load(), site.moments.block), site.channel_amax.size
    found = np.zeros((len(blocks) * site.moments.block,) * 2)
    for i, block in enumerate(blocks):
        place = slice(i * site.moments.block, (i + 1) * site.moments.block)
        found[place, place] = np.triu(block) + np.triu(block, 1).T
    return found[:channels, :channels]


def within_blocks(whole: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """A matrix with zeros outside of its diagonal blocks."""
    index = np.arange(len(whole)) // block
    return np.where(index[:, None] == index, whole, 0)


class Wide(nn.Module):
    """Three linears of one input of more channels than a block, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(200), nn.Linear(200, 8), nn.Linear(200, 8)
        self.out = nn.Linear(8, 200)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.out(self.q(y) * self.k(y))


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_of_ones_own(kind: str) -> None:
    model, rng = Wide().to(torch.bfloat16), torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 5, 200, generator=rng).to(torch.bfloat16) for _ in range(3)]
    with torch.no_grad(), recorded(model) as seen, fp8pack.observe(model, second_moments=kind) as observation:
        for batch in batches:
            model(batch)
    sites = observation.calibration().by_point
    assert sites["q.input"] is sites["k.input"] is sites["norm.output"]
    assert sites["q.input"].tokens == 30
    for point in ("q.input", "out.input"):
        site, channels = sites[point], sites[point].channel_amax.size
        values = torch.cat([value.reshape(-1, channels) for value in seen[point]]).double().numpy()
        assert site.moments is not None
        assert site.moments.block == block_of(kind, channels)
        np.testing.assert_allclose(
            moments_of(site), within_blocks(values.T @ values, site.moments.block), rtol=1e-12, atol=1e-12
        )
        np.testing.assert_array_equal(np.diagonal(moments_of(site)), site.channel_squares)


def test_what_shares_an_input_in_some_calls_alone_has_its_own_moments() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> Any:
            return self.parts["a"](x), self.parts["b"](x if len(x) == 2 else x + 1)

    module = Both()
    with torch.no_grad(), fp8pack.observe(module, second_moments="full") as observation:
        module(torch.ones(2, 3))
        module(torch.ones(4, 3))
    sites = observation.calibration().by_point
    assert moments_of(sites["parts.a.input"]).tolist() == [[6.0] * 3] * 3
    assert moments_of(sites["parts.b.input"]).tolist() == [[2 + 4 * 4.0] * 3] * 3


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "bert"])
def test_inputs_have_moments_and_nothing_else_has(family: str) -> None:
    model, tokenizer = make_model(family), make_tokenizer()
    with torch.no_grad(), fp8pack.observe(model, second_moments="blocks") as observation:
        for text in TEXTS[:3]:
            model(**tokenizer(text, return_tensors="pt"))
    found = observation.calibration()
    for site in found.sites:
        has_tokens = site.moments is not None or not site.tokens
        assert has_tokens == any(map(is_gemm_input, site.points)), site.points
        if site.moments is not None:
            np.testing.assert_array_equal(np.diagonal(moments_of(site)), site.channel_squares)
    assert any(site.moments for site in found.sites)


def test_padding_is_left_out() -> None:
    model, tokenizer = make_model("qwen3"), make_tokenizer()
    batch = tokenizer(["a longer text", "short"], return_tensors="pt", padding=True)
    with torch.no_grad(), fp8pack.observe(model, second_moments="full") as together:
        model(**batch)
    for site in together.calibration().sites:
        if site.moments is not None:
            np.testing.assert_array_equal(np.diagonal(moments_of(site)), site.channel_squares)


@pytest.mark.parametrize(("tokens", "channels", "block"), [(700, 300, 128), (600, 333, 333), (90, 5000, 128)])
def test_the_number_of_threads_does_not_matter(tokens: int, channels: int, block: int) -> None:
    values = np.random.default_rng(0).integers(0x3C00, 0x4100, (tokens, channels)).astype(np.uint16)
    rows, found = Rows.of(np.zeros(tokens, np.int32)), []
    for count in (1, 2, 5):
        threads, moments = Threads(1, count), np.zeros((-(-channels // block), block, block))
        threads.add_moments(values, rows, moments)
        threads.close()
        found.append(triangles_of(moments))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


# Files, and runs of `calibrate`.


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A kind, prompts, and the file of one run."""
    folder = tmp_path_factory.mktemp(request.param)
    prompts = write_prompts(folder / "prompts.jsonl")
    path = folder / "whole.safetensors"
    fp8pack.calibrate(DEMO, path, prompts=str(prompts), second_moments=request.param)
    return request.param, prompts, path


def calibrate(whole: tuple[str, Path, Path], path: Path, **options: Any) -> Calibration:
    kind, prompts, _ = whole
    fp8pack.calibrate(DEMO, path, prompts=str(options.pop("prompts", prompts)), second_moments=kind, **options)
    return read_calibration(path)


def test_a_file_with_moments_has_schema_2_and_reads_back(whole: tuple[str, Path, Path]) -> None:
    kind, _, path = whole
    found = read_calibration(path)
    assert found.options["second_moments"] == kind
    blocks = [site.moments.block for site in found.sites if site.moments]
    assert set(blocks) == ({128} if kind == "blocks" else {256, 512})
    assert b'schema": 2' in path.read_bytes()[:100_000].replace(b"\\", b"")


def test_a_streamed_run_gives_the_same_bytes(whole: tuple[str, Path, Path], tmp_path: Path) -> None:
    calibrate(whole, tmp_path / "streamed.safetensors", stream_layers="on")
    assert (tmp_path / "streamed.safetensors").read_bytes() == whole[2].read_bytes()


@pytest.mark.parametrize("streamed", ["off", "on"])
def test_an_interrupted_run_continues_to_the_same_bytes(
    streamed: str, whole: tuple[str, Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "resumed.safetensors"
    for _ in range(50):
        try:
            calibrate(whole, path, stream_layers=streamed, deadline=0 if streamed == "off" else 0.2)
            break
        except DeadlineError:
            continue
    assert path.read_bytes() == whole[2].read_bytes()


def test_a_merge_agrees_with_one_run_to_1e_12(whole: tuple[str, Path, Path], tmp_path: Path) -> None:
    for i, texts in enumerate((TEXTS[:3], TEXTS[3:])):
        calibrate(whole, tmp_path / f"{i}.safetensors", prompts=write_prompts(tmp_path / f"{i}.jsonl", texts))
    fp8pack.merge([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "both.safetensors")
    both, one = read_calibration(tmp_path / "both.safetensors"), read_calibration(whole[2])
    assert [site.points for site in both.sites] == [site.points for site in one.sites]
    for ours, theirs in zip(both.sites, one.sites, strict=True):
        assert (ours.moments is None) == (theirs.moments is None)
        if ours.moments is not None and theirs.moments is not None:
            scale = np.sqrt(np.outer(theirs.channel_squares, theirs.channel_squares))
            assert (np.abs(moments_of(ours) - moments_of(theirs)) <= 1e-12 * scale).all()


def test_files_with_and_without_moments_do_not_join(whole: tuple[str, Path, Path], tmp_path: Path) -> None:
    fp8pack.calibrate(
        DEMO, tmp_path / "none.safetensors", prompts=str(write_prompts(tmp_path / "p.jsonl", TEXTS[:1])), num_prompts=1
    )
    with pytest.raises(InputError, match="second_moments"):
        fp8pack.merge([whole[2], tmp_path / "none.safetensors"], tmp_path / "both.safetensors")


def test_moments_that_contradict_the_squares_are_refused(whole: tuple[str, Path, Path], tmp_path: Path) -> None:
    bad = bytearray(whole[2].read_bytes())
    begin = 8 + int.from_bytes(bad[:8], "little")
    bad[begin : begin + 8] = np.float64(-1).tobytes()  # the first moment of all
    (tmp_path / "bad.safetensors").write_bytes(bad)
    site = next(site for site in read_calibration(tmp_path / "bad.safetensors").sites if site.moments)
    assert site.moments is not None
    with pytest.raises(InputError, match="contradict"):
        site.moments.load()


def test_a_file_that_was_replaced_is_noticed(whole: tuple[str, Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(whole[2].read_bytes())
    site = next(site for site in read_calibration(path).sites if site.moments)
    path.write_bytes(whole[2].read_bytes() + b" ")
    assert site.moments is not None
    with pytest.raises(InputError, match="changed"):
        site.moments.load()


def test_triangles_and_matrices_are_each_others_inverse() -> None:
    matrices = np.triu(np.random.default_rng(0).standard_normal((3, 5, 5)))
    np.testing.assert_array_equal(matrices_of(triangles_of(matrices), 5), matrices)
    assert list(itertools.accumulate(triangles_of(matrices)[0, :2])) == list(itertools.accumulate(matrices[0, 0, :2]))
