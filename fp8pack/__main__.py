"""`python -m fp8pack`, and the entry point of the `fp8pack` command."""

import gc
import os
import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is work to keep: Ctrl-C ends the imports without a word
gc.set_threshold(100_000)  # imports make many objects and no garbage: 3 % of a pack went into looking for some
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy starts these threads, they spin, and nothing here needs them

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # Typer imports pydantic, which would search every package

from fp8pack.cli.app import main  # noqa: E402

if __name__ == "__main__":
    main()
