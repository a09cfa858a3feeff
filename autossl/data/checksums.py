"""Checksums that say whether a file still holds what was written: of arrays, zip files and lines of a log."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

CHECKSUM = "checksum"


def text_checksum(text: str) -> str:
    """CRC-32 of a text, eight hexadecimal digits."""
    return f"{zlib.crc32(text.encode()):08x}"


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of all the rest as its last entry."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    return {**rest, CHECKSUM: text_checksum(json.dumps(rest, sort_keys=True))}


def without_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """The object without its checksum; one that was written without any is taken as it is.

    Raises:
        ValueError: the checksum does not fit.
    """
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    if CHECKSUM in content and with_checksum(rest)[CHECKSUM] != content[CHECKSUM]:
        raise ValueError("its checksum does not fit: it was changed or damaged")
    return rest


def zip_damage(path: Path) -> str | None:
    """What is wrong with a zip file of uncompressed entries (checkpoints, locations); None where it is whole.

    Every entry is read and compared with its CRC-32.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                return "its entries are compressed"
            damaged = file.testzip()
    except Exception as error:  # a damaged directory makes zipfile raise many types
        return f"not a whole file ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None if damaged is None else f"the checksum of its entry {damaged} does not fit"


def array_checksum(array: Any, source: Any = None) -> str:
    """CRC-32 of a blosc2 array: shape, type, `source` (plain values) and its chunks as they are stored."""
    head = json.dumps([list(array.shape), str(array.dtype), source], sort_keys=True)
    value = zlib.crc32(head.encode())
    for index in range(array.schunk.nchunks):
        value = zlib.crc32(array.schunk.get_chunk(index), value)
    return f"{value:08x}"
