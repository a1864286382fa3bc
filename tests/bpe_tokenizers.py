"""Small byte-level BPE tokenizers in folders of transformers."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = ["The year 1234567 was 2024, and 123 456 789.", "cafe\u0301 nai\u0308ve", "  a  b"] * 9
END = "<|endoftext|>"

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
THREE_DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"), BYTE_LEVEL]
)


def save_bpe(
    folder: Path,
    name: str | None,
    splitting: pre_tokenizers.PreTokenizer = BYTE_LEVEL,
    normalizer: normalizers.Normalizer | None = None,
    size: int = 300,
) -> Path:
    """A byte-level BPE under a class of transformers.

    With fewer than 257 entries it has the characters of the texts only.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if size > 256 else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": END} | ({"tokenizer_class": name} if name else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
