"""What is installed of the parts that are optional."""

from __future__ import annotations

from importlib.util import find_spec

MEGATRON_IS_MISSING = (
    "megatron-core is not installed, and training in Megatron needs it: "
    "pip install 'megatron-tst[megatron]'."
)


def has_megatron() -> bool:
    """Whether megatron-core can be imported; does not import it."""
    try:
        return find_spec("megatron.core") is not None
    except ImportError:
        return False
