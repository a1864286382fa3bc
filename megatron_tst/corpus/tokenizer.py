"""Hugging Face tokenizers for preprocessing: load one, train one, or take bytes as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_tst.common.errors import UsageError, read_json_object

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

_TURN_ENDS = {
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|end|>", "<end_of_turn>"),
    *("<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|call|>", "<|user|>"),
    *("<|assistant|>", "<|observation|>", "<turn|>", "<|message_end|>", "<|role_end|>"),
}
_DOCUMENT_ENDS = (
    *("<|end_of_text|>", "<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<eos>"),
    *("<|eos|>", "</s>", "<EOS_TOKEN>"),
)


@dataclass(frozen=True)
class CorpusTokenizer:
    """A tokenizer and the token that ends its documents.

    Attributes:
        definition: content of ``tokenizer.json``; travels to worker processes as it is.
        eod_token: end-of-document token.
        eod_id: its id.
        vocab_size: number of entries, added tokens included: the size Megatron reports.
    """

    definition: str
    eod_token: str
    eod_id: int
    vocab_size: int

    @property
    def sha256(self) -> str:
        """Fingerprint of ``tokenizer.json``."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    def save_files(self, folder: Path) -> None:
        """Writes the files that ``AutoTokenizer`` and Megatron load offline into ``folder``.

        For tokenizers made here: a loaded one has a folder, whose settings stay as they are.
        """
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eod_token,
            "clean_up_tokenization_spaces": False,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(self.definition, encoding="utf-8", newline="")
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(path: Path, eod_token: str | None = None) -> CorpusTokenizer:
    """Loads a ``tokenizer.json``, or a folder that holds one.

    Args:
        path: the file or the folder.
        eod_token: end-of-document token; by default the ``eos_token`` of the
            ``tokenizer_config.json`` next to the tokenizer, which is also Megatron's choice.

    Raises:
        UsageError: no usable tokenizer, no end-of-document token, or ids beyond the vocabulary.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"--tokenizer {path} does not exist: name a {TOKENIZER_FILE} or a folder.")
    try:
        definition = file.read_bytes().decode()
        tokenizer = Tokenizer.from_str(definition)
    # The library raises bare Exception for every malformed file.
    except Exception as error:
        raise UsageError(
            f"--tokenizer {file} is no Hugging Face tokenizer ({error}): "
            f"name a {TOKENIZER_FILE} that the tokenizers library writes."
        ) from error
    return _corpus_tokenizer(tokenizer, definition, eod_token or _configured_eos(file), str(file))


def library_tokenizer(definition: str) -> Tokenizer:
    """The ``tokenizers`` library's tokenizer, set up for documents: text never ends one.

    Args:
        definition: content of ``tokenizer.json``.
    """
    tokenizer = Tokenizer.from_str(definition)
    # Settings of inference that some files carry; here they would cut or lengthen documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that mentions the end-of-document token must not end there.
    tokenizer.encode_special_tokens = True
    return tokenizer


def turn_end_hint(tokenizer: CorpusTokenizer) -> str | None:
    """What to say where documents would end with the token that ends a turn of a conversation.

    Instruct tokenizers name that one as their ``eos_token``, and base models have never seen it.
    """
    if tokenizer.eod_token not in _TURN_ENDS:
        return None
    loaded = Tokenizer.from_str(tokenizer.definition)
    ends = [token for token in _DOCUMENT_ENDS if loaded.token_to_id(token) is not None]
    other = f"--eod-token '{ends[0]}'" if ends else "--eod-token with the token of its base model"
    return (
        f"documents end with {tokenizer.eod_token}, the end of a turn in an instruct tokenizer: to "
        f"pre-train pass {other}, and train with a tokenizer folder whose {CONFIG_FILE} has the "
        f"same eos_token. Passing --eod-token '{tokenizer.eod_token}' keeps it without a warning."
    )


def _configured_eos(file: Path) -> str:
    config_file = file.parent / CONFIG_FILE
    try:
        # Either the text of the token or an object that describes it.
        eos = read_json_object(config_file, "repair it").get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
    except FileNotFoundError:
        eos = None
    if not isinstance(eos, str):
        raise UsageError(
            f"--tokenizer {file} names no eos_token in {CONFIG_FILE}: set --eod-token."
        )
    return eos


def _corpus_tokenizer(
    tokenizer: Tokenizer, definition: str, eod_token: str, origin: str
) -> CorpusTokenizer:
    eod_id = tokenizer.token_to_id(eod_token)
    if eod_id is None:
        raise UsageError(
            f"--eod-token {eod_token!r} is not in the vocabulary of {origin}: choose one that is."
        )
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    # Megatron sizes the embedding by the number of entries; a higher id would index beyond it.
    highest = max(vocab.values())
    if highest >= len(vocab):
        raise UsageError(
            f"--tokenizer {origin} has token id {highest} but {len(vocab)} entries: "
            "number its tokens without gaps."
        )
    return CorpusTokenizer(definition, eod_token, eod_id, len(vocab))


def _byte_level(model: models.BPE, split_words: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=split_words
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def characters_of_bytes() -> list[str]:
    """[256] The visible character that byte-level tokenizers write for each byte (GPT-2's)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]


def byte_tokenizer() -> CorpusTokenizer:
    """A tokenizer whose ids are the bytes of the UTF-8 text: vocabulary 256, no merges.

    Id 0 is the end of a document: the NUL byte does not occur in text, and its slot keeps the
    vocabulary at 256. A NUL in a text has no id; the readers refuse such documents.
    """
    vocab = {character: byte for byte, character in enumerate(characters_of_bytes()) if byte}
    tokenizer = _byte_level(models.BPE({END_OF_DOCUMENT: 0, **vocab}, []), split_words=False)
    tokenizer.add_special_tokens([AddedToken(END_OF_DOCUMENT, normalized=False)])
    return _corpus_tokenizer(tokenizer, tokenizer.to_str(pretty=True), END_OF_DOCUMENT, "bytes")


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> CorpusTokenizer:
    """Trains a byte-level BPE with GPT-2's word splitting; id 0 is the end of a document.

    Deterministic: the same texts give the same tokenizer. A small corpus can run out of pairs to
    merge, so the vocabulary may come out smaller than asked for.

    Args:
        texts: documents; read once, and only the counts of distinct words stay in memory.
        vocab_size: entries, the 256 bytes and the end of a document included.

    Raises:
        UsageError: ``vocab_size`` cannot hold the bytes.
    """
    if vocab_size < 257:
        raise UsageError(
            f"--train-bpe is {vocab_size}: 256 bytes and the end of a document need at least 257; "
            "use --byte-level for a vocabulary of 256."
        )
    tokenizer = _byte_level(models.BPE(), split_words=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _corpus_tokenizer(tokenizer, tokenizer.to_str(pretty=True), END_OF_DOCUMENT, "BPE")
