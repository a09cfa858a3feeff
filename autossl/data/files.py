"""Files that appear whole or not at all, and hashes of their content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autossl.data.problems import InvalidInput, Problem

FULL_BELOW_BYTES = 2**20


@contextmanager
def atomic_write(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success it is synced and renamed to `path`, on error removed.

    The temporary name keeps the file's endings, because image writers choose their format by them.

    Args:
        path: where the file is to appear.
        sync: False leaves it to the system when the content reaches the disk, which is much faster for many small
            files. Then a power cut can leave a cut-off file: only for files that their reader checks for wholeness
            and that can be made again.

    Raises:
        OSError: with errno ENOSPC also where a writer noticed a full disk and said something else.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield partial
        if sync:
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        partial.replace(path)
    except RuntimeError as error:  # blosc2 and torch give no errno; the unfinished file still holds the space
        if shutil.disk_usage(path.parent).free < FULL_BELOW_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any, sync: bool = True) -> None:
    """Writes JSON atomically, with sorted-as-given keys and two spaces of indent. NaN is refused."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_write(path, sync) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads JSON; raises `InvalidInput` that names the file where it is missing or cut off."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidInput(Problem("the file does not exist", "a JSON file", "check the path", file=path)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(
            Problem(f"not valid JSON ({error})", "a complete JSON file", "restore or delete the file", file=path)
        ) from error


def content_hash(content: Any, digits: int = 10) -> str:
    """Hexadecimal hash of a JSON-able value, independent of the order of keys."""
    text = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def file_hash(path: Path, digits: int = 16) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()[:digits]
