"""The content of files, compressed or not, in which nothing is missing without an error."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import zstandard

from megatron_tst.common.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_CHUNK_BYTES = 1 << 16
_MAX_WINDOW_BYTES = 1 << 31
"""The largest that Zstandard itself decodes (zstd --long=31)."""

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises."""


def unreadable(path: Path, error: Exception) -> UsageError:
    """The error of a file that cannot be read."""
    return UsageError(f"{path} cannot be read ({error}): repair it or leave it out of --input.")


@contextmanager
def open_content(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file for reading.

    Yields:
        The file, whose position measures progress, and its decompressed content: the same object
        where it is not compressed.

    Raises:
        EOFError: a compressed file of 0 bytes. No tool writes one: it was cut off.
    """
    open_archive = _ARCHIVES.get(path.suffix.lower())
    with path.open("rb") as file:
        if open_archive is None:
            yield file, file
            return
        if not file.peek(1):
            raise EOFError("an archive of 0 bytes")
        yield file, open_archive(file)


class _Frames(io.RawIOBase):
    """Decompressed content of a file of any number of frames, one after the other.

    The stream readers of the libraries take a truncated Zstandard file, and damage behind the first
    stream of bzip2 or xz, for the end of the file, which would shorten a corpus without a word.

    Args:
        file: the compressed file.
        new_decompressor: makes one for each frame.
        padding: bytes that may fill the place between frames and behind the last.
    """

    def __init__(
        self, file: BinaryIO, new_decompressor: Callable[[], Any], padding: bytes = b""
    ) -> None:
        self._file = file
        self._new_decompressor = new_decompressor
        self._padding = padding
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer)
        while not self._content and self._advance():
            pass
        size = min(len(target), len(self._content))
        target[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def _advance(self) -> bool:
        """Decompresses the next piece; False at the end of the file."""
        self._compressed = self._compressed or self._file.read(_CHUNK_BYTES)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("its last frame is incomplete")
            return False
        if self._frame is None:
            self._compressed = self._compressed.lstrip(self._padding)
            if not self._compressed:
                return True
            self._frame = self._new_decompressor()
        try:
            self._content = memoryview(self._frame.decompress(self._compressed))
        except zstandard.ZstdError as error:
            raise OSError(_zstandard_reason(self._compressed, error)) from error
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
        return True


def _zstandard_reason(frame: bytes, error: zstandard.ZstdError) -> str:
    if "too much memory" not in str(error):
        return str(error)
    # The byte behind the magic number and the flags; the library does not tell what it refuses.
    window = f"2^{10 + (frame[5] >> 3)} bytes" if len(frame) > 5 else "larger"
    return (
        f"its window is {window}, and Zstandard decodes at most {_MAX_WINDOW_BYTES >> 20:,} MiB: "
        "compress it again with --long=31 or less"
    )


def _zstandard_frame() -> Any:
    # Without a limit of its own the library refuses what zstd --long writes.
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()


def _frames(new_decompressor: Callable[[], Any], padding: bytes = b"") -> Any:
    return lambda file: io.BufferedReader(_Frames(file, new_decompressor, padding))


_ARCHIVES: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file)),
    ".zst": _frames(_zstandard_frame),
    ".bz2": _frames(bz2.BZ2Decompressor),
    ".xz": _frames(lzma.LZMADecompressor, padding=b"\0"),
}
COMPRESSION_EXTENSIONS = tuple(_ARCHIVES)
