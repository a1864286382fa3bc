"""The tokenizer that transformers makes of a folder, held against the one that training reads with.

Training encodes with ``tokenizer.json`` as it stands. transformers builds several classes (Qwen2,
GPT-2, Cohere and others) from the vocabulary alone, with the splitting and the normalizer that
their models had, so that a file with others in it gives other tokens without an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.tokenizer import CONFIG_FILE, TOKENIZER_FILE, library_tokenizer

PLAIN_CLASS = "PreTrainedTokenizerFast"
"""``tokenizer_class`` under which transformers 4 and 5 take ``tokenizer.json`` as it stands."""

_PLAIN_CLASSES = {PLAIN_CLASS, "TokenizersBackend"}
_PROBES = (
    *("1234567890 12 345", "In 2024, 1,048,576 of 10^6.", "x1y22z333"),
    *("cafe\u0301 nai\u0308ve A\u030angstro\u0308m", "\ufb01ne \u00bd \u2460 \uff21\uff22"),
    *(" leading", "   three", "two  and   three", "trailing ", "a\u00a0b\u3000c"),
    *("UPPER Title lower iPhone", "it's WE'LL don't", "e-mail_address@host.org"),
    *("one\ntwo\r\nthree\n\n\nfour\n", "\tdef f(x):\n\t\treturn x\n", "..." * 5 + "!?"),
    *("\u0645\u0631\u062d\u0628\u0627 \u4f60\u597d \u3053\u3093", "\U0001f469\u200d\U0001f52c"),
)


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A tokenizer of transformers that gives the tokens of training.

    Attributes:
        tokenizer: of transformers.
        note: what the user must know of the class in its folder; empty as a rule.
        is_plain: whether it was loaded as :data:`PLAIN_CLASS`, against ``tokenizer_config.json``.
    """

    tokenizer: Any
    note: str = ""
    is_plain: bool = False


def load_huggingface_tokenizer(folder: Path, named: str) -> HuggingFaceTokenizer:
    """Loads the tokenizer of a folder; runs none of its code and asks no server.

    Where the class that the folder names gives other tokens than ``tokenizer.json``, or cannot be
    built from it, the plain class is loaded, and a note says so.

    Args:
        folder: of the tokenizer.
        named: flag and value, for messages.

    Raises:
        UsageError: transformers cannot load it, or gives other tokens in either way.
    """
    # Here, because the import takes seconds.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found, reason = _try_to_load(AutoTokenizer, folder)
    if found is not None and (text := different_text(folder, found)) is None:
        return HuggingFaceTokenizer(found)
    if (folder / TOKENIZER_FILE).is_file() and "auto_map" not in _settings(folder):
        plain, _ = _try_to_load(PreTrainedTokenizerFast, folder)
        if plain is not None and different_text(folder, plain) is None:
            problem = f"gives other tokens for {text!r}" if found is not None else "cannot be built"
            note = (
                f"{named}: the tokenizer_class in {CONFIG_FILE} {problem}, and {PLAIN_CLASS} is "
                f"used, which takes {TOKENIZER_FILE} as training does: write it there."
            )
            return HuggingFaceTokenizer(plain, note, is_plain=True)
    if found is None:
        raise UsageError(
            f"{named} holds no Hugging Face tokenizer ({reason}): pass the folder with its "
            f"{TOKENIZER_FILE} and {CONFIG_FILE}."
        )
    raise UsageError(
        f"{named}: transformers gives other tokens for {text!r} than {TOKENIZER_FILE}, with which "
        f"training encodes: repair {CONFIG_FILE} or use a tokenizer that both read alike."
    )


def class_warning(path: Path) -> str | None:
    """What to say before text is encoded of a class that gives other tokens; None if none does.

    Args:
        path: ``tokenizer.json`` or its folder.
    """
    folder = path if path.is_dir() else path.parent
    name = _settings(folder).get("tokenizer_class")
    # Without a name the class follows from the model, if it is the folder of one.
    if name in _PLAIN_CLASSES or (name is None and not (folder / "config.json").is_file()):
        return None
    try:
        return load_huggingface_tokenizer(folder, f"--tokenizer {folder}").note or None
    except UsageError as error:
        return str(error)


def different_text(folder: Path, tokenizer: Callable[..., Any]) -> str | None:
    """The first probe of which a tokenizer makes other ids than the file; None if there is none."""
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        return None
    expected = library_tokenizer(file.read_text(encoding="utf-8"))
    for text in _PROBES:
        try:
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
        # A class without the token for what is unknown fails over the first such text.
        except Exception:
            return text
        if found != expected.encode(text, add_special_tokens=False).ids:
            return text
    return None


def _try_to_load(loader: Any, folder: Path) -> tuple[Any, str]:
    """The tokenizer, or None and the reason."""
    try:
        # Unless told not to, it asks on the terminal whether code in the folder may run.
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False), ""
    # transformers and tokenizers raise all kinds.
    except Exception as error:
        return None, (str(error).splitlines() or [type(error).__name__])[0]


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    # Others say what is wrong with it.
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
