"""Which files a corpus is read from."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.compression import COMPRESSION_EXTENSIONS
from megatron_tst.corpus.file_kinds import Kind, content_extension, kind_in_folder, kind_of_named


@dataclass(frozen=True)
class Source:
    """A file to read.

    Attributes:
        path: the file.
        from_folder: found by searching a folder, not named by the user.
        kind: JSON lines and Parquet rows are documents each; any other file is one document.
    """

    path: Path
    from_folder: bool
    kind: Kind


def find_sources(
    inputs: Iterable[Path],
    extensions: tuple[str, ...],
    shuffle_seed: int | None = None,
    json_key: str = "text",
    unread: Counter[str] | None = None,
) -> list[Source]:
    """The files to read, in the order of ``inputs`` and sorted by path inside each folder.

    Args:
        inputs: files, and folders that are searched recursively.
        extensions: extensions to read, below the one of a compression. JSON lines count whatever
            the name of a file that is among ``inputs`` itself.
        shuffle_seed: shuffles the order of the files reproducibly.
        json_key: member of a JSON line that holds the text.
        unread: counts what the folders hold besides, by extension or reason, and files that were
            met before.

    Raises:
        UsageError: an input does not exist, has another extension, holds documents in a form that
            is not read, or holds no file to read; or an extension would never match.
    """
    for extension in extensions:
        if content_extension(Path(f"name{extension}")) != extension:
            raise UsageError(
                f"--extensions has {extension!r}: write it like .py, in lower case, with the dot "
                f"and without {' or '.join(COMPRESSION_EXTENSIONS)}."
            )
    sources: list[Source] = []
    named = list(inputs)
    for path in named:
        if path.is_dir():
            left = Counter[str]()
            found = _sources_of_folder(path, extensions, json_key, left)
            if not found:
                raise UsageError(
                    f"--input {path} holds no file to read (it holds {described(left)}): "
                    f"--extensions is {' '.join(extensions)}, and the member --json-key {json_key}."
                )
            sources += found
            if unread is not None:
                unread += left
        elif not path.exists():
            raise UsageError(f"--input {path} does not exist: name a file or a folder.")
        else:
            sources.append(Source(path, False, kind_of_named(path, extensions, json_key)))
    if len(named) > 1:
        sources = _each_once(sources, unread)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(sources)
    return sources


def _each_once(sources: list[Source], unread: Counter[str] | None) -> list[Source]:
    """Each file where it was met first, by whatever name."""
    first: dict[str, Source] = {}
    for source in sources:
        first.setdefault(os.path.realpath(source.path), source)
    if unread is not None and len(first) < len(sources):
        unread["files named or linked twice"] += len(sources) - len(first)
    return list(first.values())


def described(unread: Counter[str] | dict[str, int], most: int = 12) -> str:
    """What was not read, the most frequent first."""
    parts = [f"{count:,} {what}" for what, count in Counter(unread).most_common(most)]
    if len(unread) > most:
        parts.append(f"{len(unread) - most} other kinds")
    return ", ".join(parts) or "nothing"


def _sources_of_folder(
    folder: Path, extensions: tuple[str, ...], json_key: str, unread: Counter[str]
) -> list[Source]:
    sources: list[Source] = []
    for path in sorted(_files_below(folder, unread)):
        extension = content_extension(path)
        kind = None
        if extension in extensions:
            kind = kind_in_folder(path, extension, extensions, json_key)
        if kind is not None:
            sources.append(Source(path, True, kind))
        elif extension in extensions:
            unread[f"{extension} without lines that have {json_key!r}"] += 1
        else:
            packed = path.suffix.lower() in COMPRESSION_EXTENSIONS
            name = extension + path.suffix.lower() if packed else extension
            unread[name or "without extension"] += 1
    return _without_links_to(sources, unread)


def _files_below(folder: Path, unread: Counter[str]) -> Iterator[Path]:
    """All files below a folder, each folder once, whatever links lead to it."""
    root = os.path.realpath(folder)
    walked: set[str] = set()
    linked: list[Path] = []

    def walk(below: Path, real: str) -> Iterator[Path]:
        walked.add(real)
        for entry in _entries(below):
            path = below / entry.name
            is_link = entry.is_symlink()
            # Of an entry a link to itself would be an error, and of a path it is none.
            is_folder = os.path.isdir(path) if is_link else entry.is_dir()
            if entry.name.startswith("."):
                unread["hidden folders" if is_folder else "hidden files"] += 1
            elif is_folder and is_link:
                linked.append(path)
            elif is_folder:
                yield from walk(path, os.path.join(real, entry.name))
            elif os.path.isfile(path) if is_link else entry.is_file():
                yield path
            else:
                unread["broken links" if is_link else "special files"] += 1

    yield from walk(folder, root)
    # Behind all others: a folder counts where it lies, and not where a link to it does.
    while linked:
        linked.sort(reverse=True)
        link = linked.pop()
        real = os.path.realpath(link)
        if real in walked or f"{root}/".startswith(real.rstrip("/") + "/"):
            unread["links to folders that are read already"] += 1
        else:
            yield from walk(link, real)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError as error:
        raise UsageError(
            f"--input {folder} cannot be searched ({error}): let it be read, or leave it out."
        ) from error


def _without_links_to(sources: list[Source], unread: Counter[str]) -> list[Source]:
    """Each file once: it counts where it lies, and not where a link to it does."""
    if not any(source.path.is_symlink() for source in sources):
        return sources
    real = {os.path.realpath(s.path) for s in sources if not s.path.is_symlink()}
    kept: list[Source] = []
    for source in sources:
        if source.path.is_symlink():
            target = os.path.realpath(source.path)
            if target in real:
                unread["links to files that are read already"] += 1
                continue
            real.add(target)
        kept.append(source)
    return kept
