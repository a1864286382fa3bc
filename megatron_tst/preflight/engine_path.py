"""Finds the Transformer Engine of ``make setup-te``, which only the preflight is to see.

Megatron takes other ways where it can import Transformer Engine, on CPUs too, and fails where one
of the libraries of Transformer Engine is missing. Imports no Megatron.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

ENGINE_FOLDER = Path(sys.prefix) / "transformer-engine"
_DRIVER = "libcuda.so.1"


def make_engine_importable() -> None:
    """Lets this process import the build; to be called before Megatron's first import.

    Does nothing where Transformer Engine is installed, as in NVIDIA's containers, or was not built.
    """
    if find_spec("transformer_engine") is not None or not ENGINE_FOLDER.is_dir():
        return
    import torch  # noqa: F401  It loads NCCL, which Transformer Engine links and does not look for.

    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        # Empty, and only there to be found: nothing of the driver is called without a GPU.
        ctypes.CDLL(str(ENGINE_FOLDER / _DRIVER), mode=ctypes.RTLD_GLOBAL)
    sys.path.append(str(ENGINE_FOLDER))
