"""Zip files from strangers: everything that their directory claims is checked before memory or disk is taken.

A zip can name files outside of the folder it is unpacked to, name one file twice, hold links, unpack to a million
times its size, or let entries share their bytes. None of this is needed here, so all of it is refused; which names
belong into an archive is for the caller to say.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from autossl.data.problems import InvalidInput, Problem

MAX_TEXT_BYTES = 4 << 20
"""Unpacked, of all compressed entries together. Others are stored as they are and cannot be larger than the archive."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_LOCAL_HEADER_BYTES = 30
_BLOCK = 1 << 20
_WHOLE = "a whole archive written by autossl_export_model"
_AGAIN = "copy or download the file again"
REFUSE = "do not install it; ask its author for an archive that autossl_export_model wrote"


@dataclass(frozen=True)
class Limits:
    """Of a zip file's directory."""

    entries: int
    directory_bytes: int
    unpacked_bytes: int = MAX_TEXT_BYTES
    """Of all compressed entries together."""


ARCHIVE = Limits(2000, 1 << 20)
CHECKPOINT = Limits(20_000, 4 << 20)
"""torch's zip files: an entry per tensor."""


@dataclass(frozen=True)
class ArchiveFile:
    """One file in an archive."""

    name: str
    n_bytes: int
    """Unpacked."""
    n_packed: int
    """In the archive."""


@contextmanager
def open_archive(
    path: Path, allowed: Callable[[str], bool], limits: Limits = ARCHIVE
) -> Iterator[tuple[zipfile.ZipFile, list[ArchiveFile]]]:
    """An archive whose every entry was checked, and its files.

    Args:
        path: of the zip file.
        allowed: whether a file of this name (with "/" between its parts), or a folder (with one at its end), belongs
            into such an archive.
        limits: of its directory.

    Raises:
        InvalidInput: no zip file, cut off, larger than it may be, or with entries that are not allowed; all are named.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInput(Problem("there is no such file", _WHOLE, "check the path", file=path))
    size = path.stat().st_size
    _check_directory(path, size, limits)
    with _opened(path) as archive:
        entries = archive.infolist()
        faults = _directory_faults(entries, size, limits)
        faults += [fault for entry in entries for fault in _faults(entry, allowed)]
        if faults:
            raise InvalidInput([Problem(found, expected, REFUSE, file=path) for found, expected in faults])
        yield (
            archive,
            [
                ArchiveFile(entry.filename, entry.file_size, entry.compress_size)
                for entry in entries
                if not entry.is_dir()
            ],
        )


def read_text(archive: zipfile.ZipFile, name: str) -> bytes:
    """A small file as a whole.

    Raises:
        InvalidInput: it is larger than text may be, or damaged.
    """
    if archive.getinfo(name).file_size > MAX_TEXT_BYTES:
        found = f"{name} unpacks to {archive.getinfo(name).file_size:,} bytes"
        raise InvalidInput(Problem(found, f"at most {MAX_TEXT_BYTES:,}", REFUSE, file=_path(archive)))
    return b"".join(_blocks(archive, name))


def unpack(archive: zipfile.ZipFile, name: str, target: Path) -> str:
    """Writes an entry to a file that must not exist yet; returns the SHA-256 of its bytes in hexadecimal.

    Raises:
        InvalidInput: the entry is damaged.
    """
    digest = hashlib.sha256()
    with target.open("xb") as file:
        for block in _blocks(archive, name):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def check_stored_only(path: Path) -> None:
    """A checkpoint is a zip file too: nothing in it may be compressed, so that reading takes no more than its size.

    Raises:
        InvalidInput: it is no whole zip file, or has entries that are compressed, encrypted or share their bytes.
    """
    size = path.stat().st_size
    _check_directory(path, size, CHECKPOINT)
    with _opened(path) as archive:
        entries = archive.infolist()
    odd = [e for e in entries if e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size]
    odd += [e for e in entries if e.flag_bits & _ENCRYPTED]
    faults = [("the checkpoint is compressed inside", "tensors stored as they are")] if odd else []
    faults += _directory_faults(entries, size, CHECKPOINT)
    if faults:
        raise InvalidInput([Problem(found, expected, REFUSE, file=path) for found, expected in faults])


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InvalidInput(Problem(f"the zip file cannot be read ({error})", _WHOLE, _AGAIN, file=path)) from error


def _blocks(archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    """Never more than the directory announced: zipfile stops there, and compares the checksum."""
    try:
        with archive.open(name) as file:
            while block := file.read(_BLOCK):
                yield block
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        found = f"{name} is damaged ({error})"
        raise InvalidInput(Problem(found, _WHOLE, _AGAIN, file=_path(archive))) from error


def _check_directory(path: Path, size: int, limits: Limits) -> None:
    """Where and how large the directory is, from the file's last bytes, before `zipfile` takes memory for it.

    Readers differ in where they look for a directory; here it stands right before the end, where all of them agree.
    """
    with path.open("rb") as file:
        file.seek(max(0, size - _END.size - _LOCATOR.size - _END64.size))
        tail = file.read()
    end, locator = tail[-_END.size :], tail[-_END.size - _LOCATOR.size : -_END.size]
    if len(end) < _END.size or end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise InvalidInput(Problem("the file does not end as a zip file does", _WHOLE, _AGAIN, file=path))
    start = size - _END.size
    n_entries, n_bytes, offset = _END.unpack(end)[4:7]
    if len(locator) == _LOCATOR.size and locator[:4] == b"PK\6\7":
        start -= _LOCATOR.size + _END64.size
        if start < 0 or tail[:4] != b"PK\6\6" or _LOCATOR.unpack(locator)[2] != start:
            raise InvalidInput(Problem("the zip file's directory is not where it should be", _WHOLE, _AGAIN, file=path))
        n_entries, n_bytes, offset = _END64.unpack(tail[: _END64.size])[7:10]
    if n_entries > limits.entries or n_bytes > limits.directory_bytes:
        found = f"a directory of {n_entries:,} files in {n_bytes:,} bytes"
        expected = f"at most {limits.entries:,} files in {limits.directory_bytes:,} bytes"
        raise InvalidInput(Problem(found, expected, REFUSE, file=path))
    if offset + n_bytes != start:
        raise InvalidInput(Problem("the zip file's directory is not where it should be", _WHOLE, _AGAIN, file=path))


def _directory_faults(entries: Sequence[zipfile.ZipInfo], size: int, limits: Limits) -> list[tuple[str, str]]:
    """What is wrong with the entries together: found, expected."""
    faults = []
    if len(entries) > limits.entries:
        faults.append((f"{len(entries):,} files", f"at most {limits.entries:,}"))
    unpacked = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
    if unpacked > limits.unpacked_bytes:
        faults.append((f"compressed files that unpack to {unpacked:,} bytes", f"at most {limits.unpacked_bytes:,}"))
    seen: set[str] = set()
    for entry in entries:
        if entry.filename.casefold() in seen:
            faults.append((f"{entry.filename!r} is there twice", "every file once, in any spelling"))
        seen.add(entry.filename.casefold())
    ends = sorted((e.header_offset, e.header_offset + _LOCAL_HEADER_BYTES + e.compress_size) for e in entries)
    borders = [*(start for start, _ in ends[1:]), size]
    if any(end > border for (_, end), border in zip(ends, borders, strict=True)):
        faults.append(("files that share their bytes", "every file in a place of its own"))
    return faults


def _faults(entry: zipfile.ZipInfo, allowed: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """What is wrong with one entry: found, expected."""
    mode = entry.external_attr >> 16
    if entry.orig_filename != entry.filename or not allowed(entry.filename):
        yield f"a file {entry.orig_filename!r}", "only the files of a model, below the archive's own folder"
    if stat.S_IFMT(mode) not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG):
        yield f"{entry.filename!r} is a link or a device", "plain files"
    if entry.compress_type not in METHODS or entry.flag_bits & _ENCRYPTED:
        yield f"{entry.filename!r} is encrypted or compressed in an unusual way", "stored or deflated files"
    elif entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
        yield f"{entry.filename!r} claims {entry.file_size:,} of {entry.compress_size:,} bytes", "equal sizes"


def _path(archive: zipfile.ZipFile) -> Path:
    return Path(str(archive.filename))
