"""A prompt in, text out."""

from __future__ import annotations

from typing import Any

import torch

from megatron_tst.common.errors import UsageError
from megatron_tst.evaluation.folder import LoadedModel


def generate(
    loaded: LoadedModel,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Continues a prompt until the end of the document or the number of tokens.

    Args:
        loaded: model and tokenizer.
        prompt: text to continue; it gets no special tokens.
        max_new_tokens: most tokens to add.
        temperature: 0 takes the likeliest token each time.
        top_p: share of the probability that is sampled from.
        seed: of the sampling.

    Returns:
        The prompt and what follows it.

    Raises:
        UsageError: an empty prompt, a prompt too long for the model, or a number out of range.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens}: use 1 or more.")
    # Less overflows, and more than a few is noise.
    if temperature and not 0.01 <= temperature <= 100:
        raise UsageError(f"--temperature {temperature:g}: use 0, or a number from 0.01 to 100.")
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p:g}: use a number above 0, up to 1.")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed}: use a number from 0 to 2^63 - 1.")
    # As in training, a prompt that spells a control token is text.
    tokens = loaded.tokenizer(
        prompt, return_tensors="pt", add_special_tokens=False, split_special_tokens=True
    )
    length = tokens["input_ids"].shape[-1]
    if not length:
        raise UsageError("the prompt is empty: pass some text.")
    if length + max_new_tokens > loaded.context:
        raise UsageError(
            f"--max-new-tokens {max_new_tokens}: the prompt has {length} tokens and the model "
            f"was made for {loaded.context}: use {max(loaded.context - length, 0)} or fewer."
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    torch.manual_seed(seed)
    ids, mask = (tokens[name].to(loaded.model.device) for name in ("input_ids", "attention_mask"))
    generated = loaded.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=loaded.tokenizer.eos_token_id,
        **sampling,
    )
    text: str = loaded.tokenizer.decode(generated[0], skip_special_tokens=True)
    return text
