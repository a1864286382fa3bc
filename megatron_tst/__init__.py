"""Token Superposition Training for Megatron-Core.

The public names are loaded on first use, so that the configuration and the schedule can be
imported where torch is not installed, and the numerics where Megatron is not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_tst.data.bag_dataset import BagDataset as BagDataset
    from megatron_tst.data.dataset import SuperpositionGPTDataset as SuperpositionGPTDataset
    from megatron_tst.model.model import SuperpositionGPTModel as SuperpositionGPTModel
    from megatron_tst.model.model import SuperpositionHybridModel as SuperpositionHybridModel
    from megatron_tst.ops.cross_entropy import (
        multi_hot_cross_entropy as multi_hot_cross_entropy,
    )
    from megatron_tst.ops.embedding import bag_embedding as bag_embedding
    from megatron_tst.ops.linear_cross_entropy import (
        linear_multi_hot_cross_entropy as linear_multi_hot_cross_entropy,
    )
    from megatron_tst.ops.modules import BagEmbedding as BagEmbedding
    from megatron_tst.ops.modules import MultiHotCrossEntropyLoss as MultiHotCrossEntropyLoss
    from megatron_tst.settings.batch_sizes import BatchSizes as BatchSizes
    from megatron_tst.settings.config import SuperpositionConfig as SuperpositionConfig
    from megatron_tst.settings.schedule import SuperpositionSchedule as SuperpositionSchedule

__version__ = "0.1.0"

_MODULE_OF = {
    "BatchSizes": "megatron_tst.settings.batch_sizes",
    "SuperpositionConfig": "megatron_tst.settings.config",
    "SuperpositionSchedule": "megatron_tst.settings.schedule",
    "bag_embedding": "megatron_tst.ops.embedding",
    "multi_hot_cross_entropy": "megatron_tst.ops.cross_entropy",
    "linear_multi_hot_cross_entropy": "megatron_tst.ops.linear_cross_entropy",
    "BagEmbedding": "megatron_tst.ops.modules",
    "MultiHotCrossEntropyLoss": "megatron_tst.ops.modules",
    "BagDataset": "megatron_tst.data.bag_dataset",
    "SuperpositionGPTModel": "megatron_tst.model.model",
    "SuperpositionHybridModel": "megatron_tst.model.model",
    "SuperpositionGPTDataset": "megatron_tst.data.dataset",
}
__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULE_OF[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "megatron":
            raise
        from megatron_tst.common.requirements import MEGATRON_IS_MISSING

        raise ImportError(f"{__name__}.{name}: {MEGATRON_IS_MISSING}") from error


def __dir__() -> list[str]:
    return sorted(__all__)
