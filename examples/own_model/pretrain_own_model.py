"""A pre-training script of one's own with superposition: own layers, Megatron's loop.

It takes the arguments of Megatron's ``pretrain_gpt.py`` and ``--tst-*``. What is not here, and what
``python -m megatron_tst.pretrain`` does besides: the checkpoint and the resets at the switch, the
``tst/...`` scalars, and errors in one line (docs/migrating.md).
"""

from __future__ import annotations

import sys
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.models import hybrid

from megatron_tst import SuperpositionGPTModel, SuperpositionHybridModel, cpu
from megatron_tst.model.offset_loss import OffsetLossMeter
from megatron_tst.settings.arguments import superposition_config_from_args
from megatron_tst.training.command_line import parse_command_line
from megatron_tst.training.data_budget import check_data_budget
from megatron_tst.training.datasets import DatasetsProvider
from megatron_tst.training.forward_step import ForwardStep
from megatron_tst.training.metrics import StepClock
from megatron_tst.training.optimizer_sharding import mend_saved_optimizer


def own_stack() -> ModuleSpec:
    """Layers of a HybridModel, by the letters of its pattern: put your own here."""
    return hybrid.default_hybrid_stack_spec


def own_layers() -> ModuleSpec:
    """Layers of a GPTModel: put your own here."""
    return get_gpt_layer_local_spec(normalization=get_args().normalization)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> SuperpositionHybridModel | SuperpositionGPTModel:
    """A provider of Megatron's models with other classes and one more argument."""
    args = get_args()
    shared: dict[str, Any] = {
        "config": config or core_transformer_config_from_args(args),
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "pre_process": pre_process,
        "post_process": post_process,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
        "rotary_percent": args.rotary_percent,
        "rotary_base": args.rotary_base,
        "vp_stage": vp_stage,
        "pg_collection": pg_collection,
        "superposition": superposition_config_from_args(args),
    }
    if pattern := args.hybrid_layer_pattern:
        return SuperpositionHybridModel(
            hybrid_stack_spec=own_stack(), hybrid_layer_pattern=pattern, **shared
        )
    return SuperpositionGPTModel(transformer_layer_spec=own_layers(), **shared)


def main() -> int:
    """Trains as the command line says; returns the exit code."""
    # Validated, compared with the checkpoint to load, and recorded for the ones to come.
    args, schedule = parse_command_line()
    # SuperpositionGPTDataset in Megatron's builder of blends.
    datasets = DatasetsProvider(args, schedule)
    schedule = check_data_budget(args, schedule, datasets.config)
    # Megatron 0.19.2 by itself saves another state of the distributed optimizer than it has.
    mend_saved_optimizer()
    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets,
        ModelType.encoder_or_decoder,
        # Bags and plain batches; any forward step does that reads them with data.batch.get_batch.
        ForwardStep(schedule, StepClock(), OffsetLossMeter()),
        model_provider=model_provider,
    )
    return 0


if __name__ == "__main__":
    # For trials on a machine without a GPU; does nothing where there is one.
    cpu.activate()
    sys.exit(main())
