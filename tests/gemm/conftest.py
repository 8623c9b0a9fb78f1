"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are defined."""

import importlib
import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    for library in ("triton.language.standard", "triton.language"):
        if library in sys.modules:  # imported by an earlier test, for a GPU
            importlib.reload(sys.modules[library])
