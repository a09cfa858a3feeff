"""Files that appear whole or not at all, and hashes of their content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from autossl.data.problems import InvalidInput, Problem

FULL_BELOW_BYTES = 2**20
MAX_JSON_BYTES = 64 << 20
"""Parsed, JSON takes up to 20 times its size; the largest of ours, a fingerprint of 10 000 cases, has 20 MiB."""
PARTIAL, REMOVING = ".partial-", ".removing-"
KILL_AT = "AUTOSSL_KILL_AT"
"""Set by benchmarks/kill_campaign.py alone: see `crash_point`."""

_points_passed = 0


def crash_point() -> None:
    """Just before or after something is written, synced or renamed. Nothing happens here in ordinary work.

    With AUTOSSL_KILL_AT=n the whole process group gets SIGKILL at the n-th point of a process, as a power cut would end
    it: so the kill campaign tries each moment between two files.
    """
    global _points_passed
    if KILL_AT in os.environ:
        _points_passed += 1
        if _points_passed == int(os.environ[KILL_AT]):
            os.killpg(0, signal.SIGKILL)


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
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}")
    crash_point()
    try:
        yield partial
        crash_point()
        if sync:
            sync_file(partial)
            crash_point()
        partial.replace(path)
        crash_point()
        if sync:
            _sync_folder(path.parent)
            crash_point()
    except RuntimeError as error:  # blosc2 and torch give no errno; the unfinished file still holds the space
        if shutil.disk_usage(path.parent).free < FULL_BELOW_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Adds text at the end of a file and syncs it. A kill may leave a part of it: readers must notice."""
    crash_point()
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        crash_point()
        os.fsync(file.fileno())
    crash_point()


def sync_file(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can."""
    with suppress(OSError):  # Windows, some network file systems
        sync_file(folder)


def remove_folder(folder: Path) -> None:
    """Removes a folder so that nobody meets half of it: it loses its name first, then its files."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    unnamed = folder.with_name(f"{REMOVING}{uuid.uuid4().hex[:8]}-{folder.name}")
    crash_point()
    folder.replace(unnamed)
    crash_point()
    shutil.rmtree(unnamed)
    crash_point()


def replace_folder(staged: Path, target: Path, aside: Path) -> None:
    """Puts a finished folder in its place; what it replaces goes aside before, and comes back where that fails.

    Args:
        staged: On the same drive.
        target: May be there.
        aside: Where nothing is; removed by whoever removes what is staged.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if target.exists():
            target.rename(aside)
        staged.rename(target)
    except BaseException:  # an interruption as well
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise


def remove_remnants(folder: Path, below: bool = True) -> None:
    """Removes what killed processes left unfinished in a folder, and below: only for whoever alone writes there."""
    found = Path(folder).rglob if below else Path(folder).glob
    for path in sorted(found(f"{REMOVING}*")):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(found(f"{PARTIAL}*")):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any, sync: bool = True) -> None:
    """Writes JSON atomically, with sorted-as-given keys and two spaces of indent. NaN is refused."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_write(path, sync) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Reads JSON.

    Raises:
        InvalidInput: naming the file, where it is missing, cut off, larger than it may be, nested too deeply, or holds
            what cannot be written again (half a surrogate pair in a text).
    """
    try:
        text = read_text(path, "a JSON file", max_bytes)
        content = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidInput):
            raise
        found = f"not valid JSON ({str(error)[:200]})"
        raise InvalidInput(Problem(found, "a complete JSON file", "restore or delete the file", file=path)) from error
    return content


def read_text(path: Path, expected: str, max_bytes: int = MAX_JSON_BYTES, encoding: str = "utf-8") -> str:
    """A text file as a whole, its size checked first; `expected` says in an error what it should have been.

    Raises:
        InvalidInput: it is missing, no plain file, larger than it may be, or in another encoding.
    """
    path = Path(path)
    if not path.exists():
        raise InvalidInput(Problem("the file does not exist", expected, "check the path", file=path))
    if not path.is_file():
        raise InvalidInput(Problem("no plain file", expected, "remove what is there in its place", file=path))
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)  # not by its size, which a file that grows does not keep
    if len(content) > max_bytes:
        found = f"more than {max_bytes >> 20} MiB of text"
        raise InvalidInput(Problem(found, f"{expected} of at most that size", "restore or delete the file", file=path))
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        found = f"not UTF-8 text ({error.reason} at byte {error.start:,})"
        raise InvalidInput(Problem(found, expected, "save it in UTF-8", file=path)) from error


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
