"""Converts an exported model with a tokenizer of its own for llama.cpp.

    python examples/llama_cpp/convert.py LLAMA_CPP FOLDER MODEL.gguf [--outtype bf16]

``LLAMA_CPP`` is a checkout of llama.cpp. Its ``convert_hf_to_gguf.py`` does the work, with the
options that follow. It stops at tokenizers that are not in its list, as newly trained ones are, and
writes a byte tokenizer that llama.cpp cannot load; both are mended here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

_SPLIT_AS_GPT2 = "gpt-2"
# llama.cpp wants a merge. The result of this one is no token, and so it has no effect.
_NO_EFFECT = "\u0100 \u0100"


def main() -> None:
    """Reads the command line and runs the converter of llama.cpp on it."""
    parser = argparse.ArgumentParser(description="Makes a GGUF file of an exported folder.")
    parser.add_argument("llama_cpp", type=Path, help="checkout of llama.cpp")
    parser.add_argument("folder", type=Path, help="exported model")
    parser.add_argument("output", type=Path, help="file to write")
    args, options = parser.parse_known_args()
    if not (args.llama_cpp / "conversion").is_dir():
        parser.error(f"{args.llama_cpp} has no folder conversion/: it is no checkout of llama.cpp.")
    # Its own gguf goes before an installed one, which may be older.
    sys.path[:0] = [str(args.llama_cpp), str(args.llama_cpp / "gguf-py")]
    base: Any = importlib.import_module("conversion.base")
    gguf: Any = importlib.import_module("gguf")
    known, add = base.TextModel.get_vocab_base_pre, gguf.SpecialVocab.add_to_gguf

    def name_of_splitting(model: Any, tokenizer: Any) -> Any:
        try:
            return known(model, tokenizer)
        except NotImplementedError:
            _check_splitting(args.folder)
            return _SPLIT_AS_GPT2

    def add_with_a_merge(vocabulary: Any, *arguments: Any) -> None:
        vocabulary.merges = vocabulary.merges or [_NO_EFFECT]
        add(vocabulary, *arguments)

    base.TextModel.get_vocab_base_pre = name_of_splitting
    gguf.SpecialVocab.add_to_gguf = add_with_a_merge
    converter = str(args.llama_cpp / "convert_hf_to_gguf.py")
    sys.argv = [converter, str(args.folder), "--outfile", str(args.output), *options]
    runpy.run_path(converter, run_name="__main__")


def _check_splitting(folder: Path) -> None:
    """Ends the program where a tokenizer is not one that preprocessing trains."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    splitting = content["pre_tokenizer"] or {}
    is_plain = splitting.get("type") == "ByteLevel" and not splitting["add_prefix_space"]
    if content["normalizer"] or not is_plain:
        sys.exit(
            f"{folder}/tokenizer.json splits text otherwise than GPT-2, and llama.cpp does not "
            "know it: add it to get_vocab_base_pre of llama.cpp's conversion/base.py."
        )


if __name__ == "__main__":
    main()
