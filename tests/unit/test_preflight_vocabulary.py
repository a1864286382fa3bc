"""The ids that preflight counts are those that Megatron would, of tokenizers of every library."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import sentencepiece
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_tst.checkpoint.hf_arguments import parse_arguments
from megatron_tst.preflight.corpus_check import resolve_vocabulary

TEXT = ["the quick brown fox jumps over the lazy dog", "a bag of tokens is the mean of them"] * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers of 300 byte pairs, of those and a control token, and of 35 pieces."""
    folder = tmp_path_factory.mktemp("tokenizers")
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    pairs.model.save(str(folder))
    whole = PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<|end|>")
    whole.save_pretrained(folder / "hugging-face")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / "pieces"),
        vocab_size=35,
        minloglevel=2,
    )
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {}/hugging-face",
        # Which Megatron does not look at here.
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {}/hugging-face --vocab-size 128",
        "--tokenizer-type Llama2Tokenizer --tokenizer-model {}/pieces.model",
        "--tokenizer-type NullTokenizer --vocab-size 5000",
    ],
)
def test_the_vocabulary_is_that_of_megatron(folder: Path, flags: str) -> None:
    argv = [*shlex.split(flags.format(folder)), "--make-vocab-size-divisible-by", "8"]
    args, reference = parse_arguments(argv), parse_arguments(argv)
    args.rank = reference.rank = 0
    ids, notes = resolve_vocabulary(args, None)
    assert ids == build_tokenizer(reference).vocab_size
    assert args.padded_vocab_size == reference.padded_vocab_size
    assert notes == []


def test_byte_pairs_of_gpt2_are_counted_without_the_hub(folder: Path) -> None:
    files = f"--vocab-file {folder}/vocab.json --merge-file {folder}/merges.txt"
    args = parse_arguments(["--tokenizer-type", "GPT2BPETokenizer", *files.split()])
    whole = PreTrainedTokenizerFast.from_pretrained(folder / "hugging-face")
    assert resolve_vocabulary(args, None) == (len(whole) - 1, [])


@pytest.mark.parametrize(
    ("flags", "ids", "said"),
    [
        (
            "--tokenizer-type Llama2Tokenizer --tokenizer-model {}/vocab.json",
            128_256,
            "the tokenizer {}/vocab.json could not be read: 128,256 ids were assumed",
        ),
        (
            "--tokenizer-type GPT2BPETokenizer --vocab-file {}/a --merge-file {}/merges.txt",
            128_256,
            "the tokenizer {}/a is not on this machine: 128,256 ids were assumed",
        ),
        (
            "--tokenizer-type HuggingFaceTokenizer --tokenizer-model a/b --vocab-size 32000",
            32_000,
            "the tokenizer a/b is not on this machine: 32,000 ids were assumed",
        ),
    ],
)
def test_a_vocabulary_that_is_assumed_is_said(
    folder: Path, flags: str, ids: int, said: str
) -> None:
    args = parse_arguments(shlex.split(flags.replace("{}", str(folder))))
    found, (note,) = resolve_vocabulary(args, None)
    assert found == ids
    assert note.text.startswith(said.replace("{}", str(folder)))
