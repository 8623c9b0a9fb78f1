"""The pages of `--html`, in a real browser: they render, sort and filter, and load nothing."""

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import DEMO, llama_config, llama_tensors, write_model
from report.chromium import MISSING, Page, chromium, find_chromium
from typer.testing import CliRunner

import fp8pack
from fp8pack.cli.app import app
from fp8pack.reading.inspection import Inspection, ScaleRange, TensorInspection
from fp8pack.report.page.write import html_report

PROGRAM = find_chromium()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason=MISSING)]
SORTED = (
    "[...document.querySelectorAll('.rows tbody tr:not([aria-hidden]) td:first-child')].map(cell => cell.textContent)"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(PROGRAM or "", tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    folder = tmp_path_factory.mktemp("packed")
    source = write_model(folder / "source", llama_tensors(), llama_config())
    fp8pack.pack(source, folder / "out", scheme="FP8_DYNAMIC")
    return fp8pack.inspect(folder / "out", source)


def click(page: Page, title: str) -> None:
    page.run(f"[...document.querySelectorAll('.rows button')].find(b => b.textContent === {title!r}).click()")


def type_filter(page: Page, words: str) -> None:
    page.run(
        "{ const box = document.querySelector('input[type=search]'); "
        f"box.value = {json.dumps(words)}; box.dispatchEvent(new Event('input')); }}"
    )


def test_an_inspection_renders_sorts_and_filters(page: Page, found: Inspection, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(html_report(found, "fp8pack inspect out"), encoding="utf-8")
    page.open(path)
    assert page.run("document.querySelector('h1').textContent") == "out: inspection"
    assert "14 of 21 tensors are quantized" in page.run("document.querySelector('.lead').textContent")
    names = page.run(SORTED)
    assert names == [tensor.name for tensor in sorted(found.tensors, key=lambda t: natural_name(t.name))]
    by_sqnr = [t.name for t in sorted(found.tensors, key=lambda t: (t.sqnr is None, t.sqnr or 0))]
    click(page, "SQNR dB")
    assert page.run(SORTED)[:14] == by_sqnr[:14]
    assert page.run("document.querySelector('th[aria-sort=ascending]').textContent") == "SQNR dB"
    click(page, "SQNR dB")
    values = [found[name].sqnr for name in page.run(SORTED)]
    measured = [value for value in values if value is not None]
    assert values[14:] == [None] * 7
    assert measured == pytest.approx(sorted(measured, reverse=True), abs=1e-4)  # a page has six digits
    type_filter(page, "down_proj sqnr>1")
    assert sorted(page.run(SORTED)) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert page.run("document.getElementById('tensors-count').textContent") == "2 of 21"
    type_filter(page, "nothing like this")
    assert page.run(SORTED) == []
    assert page.run("document.querySelectorAll('.heat tbody tr').length") == 2
    assert page.pdf().startswith(b"%PDF")
    assert page.problems == []


def natural_name(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def test_an_evaluation_and_a_calibration_render(page: Page, tmp_path: Path) -> None:
    runner = CliRunner()
    words = ["calibrate", str(DEMO), "-o", str(tmp_path / "c.safetensors"), "--num-prompts", "4", "--max-length", "32"]
    assert runner.invoke(app, [*words, "-q"]).exit_code == 0
    fp8pack.pack(DEMO, tmp_path / "out", scheme="FP8_DYNAMIC")
    words = ["eval", str(tmp_path / "out"), "--against", str(DEMO), "--num-tokens", "300", "-q"]
    assert runner.invoke(app, [*words, "--html", str(tmp_path / "eval.html")]).exit_code == 0
    words = ["inspect", str(tmp_path / "c.safetensors"), "--html", str(tmp_path / "calibration.html")]
    assert runner.invoke(app, words).exit_code == 0
    page.open(tmp_path / "eval.html")
    assert "KL divergence" in page.run("document.querySelector('.lead').textContent")
    assert page.run("document.querySelectorAll('svg').length") == 2
    page.open(tmp_path / "calibration.html")
    assert page.run("document.querySelectorAll('.heat').length") == 3
    click(page, "amax")
    assert "down_proj" in page.run(SORTED)[0]
    assert page.problems == []


def test_a_phone_and_a_dark_screen(page: Page, found: Inspection, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(html_report(found), encoding="utf-8")
    page.open(path, width=390, height=800)
    assert page.run("document.documentElement.scrollWidth") <= 390
    light = page.run("getComputedStyle(document.body).backgroundColor")
    page.open(path, dark=True)
    assert page.run("getComputedStyle(document.body).backgroundColor") != light
    assert page.problems == []


def test_names_that_are_markup_or_scripts_are_text(page: Page, found: Inspection, tmp_path: Path) -> None:
    evil = "</script><script>document.title = 'taken'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>\u202e"
    tensors = tuple(dataclasses.replace(tensor, name=evil + tensor.name, role=evil) for tensor in found.tensors)
    path = tmp_path / "page.html"
    hostile = dataclasses.replace(found, tensors=tensors, architecture=evil, checkpoint=Path(evil.replace("/", "")))
    path.write_text(html_report(hostile, evil), encoding="utf-8")
    page.open(path)
    assert "taken" not in page.run("document.title").split("'")[::2]
    assert page.run("document.title") != "taken"
    assert page.run("document.querySelectorAll('img').length") == 0
    assert len(page.run(SORTED)) == 21
    assert page.problems == []


def test_a_page_of_100_000_tensors_is_small_and_quick(page: Page, found: Inspection, tmp_path: Path) -> None:
    example = next(tensor for tensor in found.tensors if tensor.error)
    tensors = tuple(many(example, 100_000))
    path = tmp_path / "page.html"
    path.write_text(html_report(dataclasses.replace(found, tensors=tensors)), encoding="utf-8")
    assert path.stat().st_size < 20e6
    started = time.monotonic()
    page.open(path)
    opened = time.monotonic() - started
    assert page.run("document.querySelectorAll('.rows tbody tr').length") < 200
    seconds = page.run("{ const t = performance.now(); document.querySelectorAll('.rows button')[7].click(); "
                       "performance.now() - t }") / 1000  # fmt: skip
    print(f"opened in {opened:.2f} s, sorted in {seconds:.2f} s, {path.stat().st_size / 1e6:.1f} MB")
    assert opened < 3
    assert seconds < 3
    assert page.run(SORTED)[0] == min(tensors, key=lambda tensor: tensor.sqnr or 0).name
    page.run("document.querySelector('.rows').scrollTop = 1e6")
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.run("Number(document.querySelector('.rows tr[aria-rowindex]').getAttribute('aria-rowindex'))") > 10_000
    assert page.problems == []


def many(example: TensorInspection, count: int) -> Iterator[TensorInspection]:
    """Weights of experts in 60 layers, each with its own numbers."""
    assert example.error is not None
    for i in range(count):
        layer, expert = divmod(i, 1667)
        yield dataclasses.replace(
            example,
            name=f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
            sqnr=31 + (i * 7919 % 100_003) / 1e5,
            scale=ScaleRange("s", 1e-4 * (1 + i % 977), 1e-3 * (1 + i % 991)),
            error=dataclasses.replace(example.error, relative_mean=0.02 + i / 1e7, outlier_ratio=4 + i % 631 / 100),
        )


def test_a_page_is_written_whole_or_not_at_all(found: Inspection, tmp_path: Path) -> None:
    runner = CliRunner()
    out = found.checkpoint
    page = tmp_path / "page.html"
    page.write_text("an earlier page")
    assert runner.invoke(app, ["inspect", str(out), "--html", str(page)]).exit_code == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [page]
    config = out / "config.json"
    for path, code in ((config, 2), (tmp_path / "no" / "page.html", 4), (out, 2)):
        ran = runner.invoke(app, ["inspect", str(out), "--html", str(path)])
        assert getattr(ran.exception, "exit_code", None) == code, path
    json.loads(config.read_text())
