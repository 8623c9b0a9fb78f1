"""Take the pictures of docs/images/: the pages of the demo model, on a desktop, a phone, and dark."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from checkpoints import DEMO
from report.chromium import MISSING, chromium, find_chromium

import fp8pack

SCHEMES = ("FP8_DYNAMIC", "FP8_BLOCK")


def main(target: Path) -> None:
    """Write the pictures into a folder."""
    program = find_chromium()
    if program is None:
        sys.exit(MISSING)
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = Path(shutil.copytree(DEMO, folder / "demo-qwen3")).relative_to(folder)
        os.chdir(folder)  # so that no path of this machine is in a picture
        outputs = [Path(f"demo-{scheme}") for scheme in SCHEMES]
        for output, scheme in zip(outputs, SCHEMES, strict=True):
            fp8pack.pack(source, output, scheme=scheme)
        inspection, evaluation = folder / "inspection.html", folder / "evaluation.html"
        found = fp8pack.inspect(outputs[0], source)
        inspection.write_text(fp8pack.html_report(found, "fp8pack inspect demo-FP8_DYNAMIC --against demo-qwen3"))
        cost = fp8pack.evaluate(outputs, source, num_tokens=4000)
        command = "fp8pack eval demo-FP8_DYNAMIC demo-FP8_BLOCK --against demo-qwen3 --num-tokens 4000"
        evaluation.write_text(fp8pack.html_report(cost, command))
        with chromium(program, folder / "profile") as page:
            page.open(inspection, width=1000, height=1100)
            page.picture(target / "inspection.png")
            page.open(inspection, width=390, height=800)
            page.picture(target / "inspection-phone.png")
            page.open(evaluation, width=1000, height=900, dark=True)
            page.picture(target / "evaluation-dark.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
