"""Shows faults of the installed megatron-core: python -m scripts.host_faults [NAME ...]."""

from __future__ import annotations

import sys
import warnings

from scripts.host_faults import (
    checkpoint,
    data,
    fsdp,
    latent_attention,
    loss,
    multi_token,
    optimizer,
    router,
)

FAULTS = {
    function.__name__: function
    for function in (
        router.expert_bias_with_padding,
        router.global_loss_of_unequal_batches,
        router.layers_of_a_hybrid_model,
        router.local_count_with_padding,
        loss.gathered_logits,
        latent_attention.latent_keys_of_local_modules,
        latent_attention.latent_keys_without_sequence_parallelism,
        multi_token.mtp_and_deferred_gradients,
        multi_token.mtp_and_tied_embeddings,
        multi_token.mtp_counts_of_a_rank,
        multi_token.mtp_counts_under_context_parallelism,
        multi_token.packed_targets_of_mtp,
        optimizer.attention_sinks_in_clipping,
        optimizer.gated_delta_net_norm,
        optimizer.weight_decay_after_resume,
        checkpoint.random_state_of_experts,
        data.small_corpus_of_a_blend,
        data.split_without_documents,
        fsdp.step_before_the_first,
    )
}


def main(names: list[str]) -> int:
    """Prints what each fault shows; 1 if one is there no more.

    Args:
        names: faults; all without one.
    """
    warnings.simplefilter("ignore")
    changed = 0
    for name in names or FAULTS:
        try:
            print(f"{name}: {FAULTS[name]()}", flush=True)
        except AssertionError as error:
            changed = 1
            print(f"{name}: NOT AS DESCRIBED: {error}", flush=True)
    return changed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
