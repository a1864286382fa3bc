"""The files of a corpus: their names, and what they may take the place of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.tokenizer import CONFIG_FILE, TOKENIZER_FILE

_SUFFIXES = (".bin", ".idx", ".json", ".left-out.log")
_TOKENIZER_FILES = (TOKENIZER_FILE, CONFIG_FILE)


def with_suffix(prefix: Path, suffix: str) -> Path:
    """A file of a corpus: its prefix with ``suffix`` appended."""
    return prefix.parent / (prefix.name + suffix)


def checked_prefix(prefix: str | Path) -> Path:
    """The value of ``--output-prefix``.

    Raises:
        UsageError: it names a folder, with a slash at its end or by dots.
    """
    if os.path.basename(prefix) in ("", ".", ".."):
        raise UsageError(
            f"--output-prefix {prefix} names a folder: add the name of the corpus, as in "
            f"{os.path.join(prefix, 'corpus')}."
        )
    return Path(prefix)


def refuse_inputs(prefix: Path, inputs: Iterable[Path], with_tokenizer: bool = True) -> None:
    """Refuses to write over a file that is read.

    Args:
        prefix: path of the corpus without extension.
        inputs: the files to read.
        with_tokenizer: they are not to be those of ``<prefix>-tokenizer`` either.

    Raises:
        UsageError: naming it.
    """
    written = [with_suffix(prefix, suffix) for suffix in _SUFFIXES]
    if with_tokenizer:
        written += [with_suffix(prefix, "-tokenizer") / name for name in _TOKENIZER_FILES]
    outputs = {os.path.realpath(path): path for path in written}
    names = {os.path.basename(path) for path in outputs}
    for path in inputs:
        # A name of its own and no link: it is none of them, whatever folders lead to it.
        if path.name not in names and not path.is_symlink():
            continue
        if (output := outputs.get(os.path.realpath(path))) is not None:
            raise UsageError(
                f"--output-prefix {prefix} would write {output} over the input {path}: choose "
                "another prefix."
            )


def refuse_existing(prefix: Path, tokenizer_sha256: str | None, overwrite: bool) -> None:
    """Refuses to replace a corpus that is there, unless that is allowed.

    Args:
        prefix: path of the corpus without extension.
        tokenizer_sha256: fingerprint of the tokenizer that may stay beside it; None for none.
        overwrite: it is allowed.

    Raises:
        UsageError: naming what is there; or there is a tokenizer that is not to be removed.
    """
    files = [with_suffix(prefix, suffix) for suffix in _SUFFIXES]
    existing = [str(path) for path in files if os.path.lexists(path)]
    if has_other_tokenizer(prefix, tokenizer_sha256):
        existing.append(str(with_suffix(prefix, "-tokenizer")))
    if existing and not overwrite:
        raise UsageError(
            f"--output-prefix {prefix}: {', '.join(existing)} already there; "
            "choose another prefix or pass --overwrite."
        )
    if has_other_tokenizer(prefix, tokenizer_sha256):
        _check_removable(prefix)


def has_other_tokenizer(prefix: Path, tokenizer_sha256: str | None) -> bool:
    """Whether ``<prefix>-tokenizer`` is there and not the tokenizer of that fingerprint."""
    folder = with_suffix(prefix, "-tokenizer")
    if not os.path.lexists(folder):
        return False
    return tokenizer_sha256 is None or fingerprint_beside(prefix) != tokenizer_sha256


def fingerprint_beside(prefix: Path) -> str | None:
    """SHA-256 of the ``tokenizer.json`` in ``<prefix>-tokenizer``; None where there is none."""
    file = with_suffix(prefix, "-tokenizer") / TOKENIZER_FILE
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def remove_tokenizer(prefix: Path) -> None:
    """Removes ``<prefix>-tokenizer``.

    Raises:
        UsageError: it is a link, or holds other files than preprocessing writes there.
    """
    _check_removable(prefix)
    folder = with_suffix(prefix, "-tokenizer")
    for name in _TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _check_removable(prefix: Path) -> None:
    folder = with_suffix(prefix, "-tokenizer")
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(
            f"--output-prefix {prefix}: {folder} is no folder that preprocessing made; move it "
            "away, or choose another prefix."
        )
    others = sorted(path.name for path in folder.iterdir() if path.name not in _TOKENIZER_FILES)
    if others:
        raise UsageError(
            f"--output-prefix {prefix}: {folder} is another tokenizer and holds {others[0]}, which "
            "preprocessing does not write; move it away, or choose another prefix."
        )
