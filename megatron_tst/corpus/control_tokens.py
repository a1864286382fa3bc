"""Control tokens that a text spells out: text is data, and none of it ends or begins anything."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer


class ControlTokens:
    """The ids that only a tool may put into a corpus.

    The library can be told to take the added tokens that are marked special for text. Yet their
    ids also come from the model of a tokenizer: where it holds the whole token as a word or piece,
    as Unigram, WordLevel and BPE that ignores merges do. And an end-of-document token need not be
    marked special.

    Args:
        definition: content of ``tokenizer.json``.
        eod_id: end of a document; None if none is known.
    """

    def __init__(self, definition: str, eod_id: int | None) -> None:
        # The library reads files without some members, as GPT-2's, and writes them all.
        complete = Tokenizer.from_str(definition).to_str()
        self._definition: dict[str, Any] = json.loads(complete)
        unknown = self._unknown()
        self._ids = {
            token["id"]
            for token in self._definition["added_tokens"]
            # A text that the vocabulary does not cover rightly holds the unknown token.
            if token["special"] and unknown not in (token["id"], token["content"])
        }
        if eod_id is not None:
            self._ids.add(eod_id)
        ids = sorted(self._ids)
        starts = [i for i in ids if i - 1 not in self._ids]
        ends = [i for i in ids if i + 1 not in self._ids]
        self._ranges = list(zip(starts, ends, strict=True))

    def are_in(self, ids: npt.NDArray[np.integer]) -> bool:
        """Whether one of them is among the ids of a text."""
        return any(bool(((ids >= start) & (ids <= end)).any()) for start, end in self._ranges)

    def unspellable(self) -> str:
        """The tokenizer with the same ids, in which no text spells a control token.

        Each keeps its id under a name with a NUL, which no document holds. Merges go that would
        make it of its parts, or make something of it.
        """
        added = [
            token | {"content": _name(token["id"]), "special": True, "normalized": False}
            if token["id"] in self._ids
            else token
            for token in self._definition["added_tokens"]
        ]
        model = self._unspellable_model()
        # It changes no id, and may look for tokens by their old names.
        changed = {"added_tokens": added, "model": model, "post_processor": None}
        return json.dumps(self._definition | changed)

    def _unknown(self) -> Any:
        model = self._definition["model"]
        return model.get("unk_id") if model["type"] == "Unigram" else model.get("unk_token")

    def _unspellable_model(self) -> dict[str, Any]:
        model: dict[str, Any] = self._definition["model"]
        if model["type"] == "Unigram":
            vocab = [
                [_name(i), score] if i in self._ids else [piece, score]
                for i, (piece, score) in enumerate(model["vocab"])
            ]
            return model | {"vocab": vocab}
        renamed = {piece: _name(i) for piece, i in model["vocab"].items() if i in self._ids}
        changed: dict[str, Any] = {
            "vocab": {renamed.get(piece, piece): i for piece, i in model["vocab"].items()},
            "unk_token": renamed.get(model["unk_token"], model["unk_token"]),
        }
        if "merges" in model:
            changed["merges"] = [
                merge for merge in model["merges"] if not _touches(merge, renamed.keys())
            ]
        return model | changed


def _name(token_id: int) -> str:
    return f"\0{token_id}"


def _touches(merge: Any, pieces: Any) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in pieces or right in pieces or left + right in pieces
