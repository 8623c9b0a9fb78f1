import subprocess
import sys

import fp8pack


def test_every_public_name_resolves_and_has_a_docstring() -> None:
    for name in fp8pack.__all__:
        if name != "__version__":
            assert getattr(fp8pack, name).__doc__, name
    assert set(fp8pack.__all__) == set(dir(fp8pack))


def test_importing_the_package_imports_nothing_else() -> None:
    program = "import sys; before = set(sys.modules); import fp8pack; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "numpy" not in done.stdout
    assert "torch" not in done.stdout
