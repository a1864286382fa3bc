"""Compares figures that are drawn anew with those that are committed."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def assert_same_drawing(drawn: Path, committed: Path) -> None:
    """Two PNGs or two PDFs show the same."""
    if committed.suffix == ".pdf":
        _assert_same_page(drawn, committed)
    else:
        _assert_same_pixels(drawn, committed)


def _assert_same_pixels(drawn: Path, committed: Path) -> None:
    ours, theirs = (
        np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in (drawn, committed)
    )
    assert ours.shape == theirs.shape
    # Another processor may round a coordinate otherwise, which shades an edge by a little; a
    # marker that moved changes a hundred pixels from one colour to another.
    changed = np.abs(ours - theirs).max(axis=2) > 64
    assert changed.sum() < 30


def _assert_same_page(drawn: Path, committed: Path) -> None:
    number = rb"-?[0-9]+[.]?[0-9]*"
    pages = [_page_of(path) for path in (drawn, committed)]
    assert re.sub(number, b"", pages[0]) == re.sub(number, b"", pages[1])
    places = [np.array(re.findall(number, page), dtype=float) for page in pages]
    assert len(places[0]) > 100
    # In points, 72 an inch.
    np.testing.assert_allclose(places[0], places[1], atol=0.01)


def _page_of(pdf: Path) -> bytes:
    """The drawing of a PDF with one page, among its fonts and markers."""
    found = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf.read_bytes(), re.DOTALL)
    streams = map(zlib.decompress, found)
    return next(stream for stream in streams if stream.startswith(b"/DeviceRGB"))
