"""Files of a source are opened first and looked at then: what is checked is what is read."""

import os
import stat
from pathlib import Path

from fp8pack.errors import InputError


def open_regular(path: Path) -> int:
    """Open a regular file for reading; a FIFO, device or directory is refused, and a FIFO without a writer never hangs.

    Raises:
        InputError: it is missing, cannot be read, or is no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing in {path.parent}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise InputError(f"{str(path)[:200]!r} cannot be read: {reason}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError(f"{path.name} is not a regular file")
    return fd


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file; raises as `open_regular` does."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read()
