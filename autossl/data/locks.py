"""Locks on work that must not be done twice at once: they say who holds them and since when.

The system's own lock (flock) decides: it goes with its process, however that ends, so a killed run can go on at once.
The record in the file is for people, and for drives whose locks are unknown or do not reach other machines: there a
record of another machine is believed, because nobody here can tell whether its process still lives.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from autossl.data.problems import InvalidInput, Problem

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
"""The last two: a file lies where a folder should be."""
MAX_RECORD_BYTES = 4096
FOLDER = ".locks"


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    command: str
    pid: int
    host: str
    since: str
    """Local time."""
    boot: str = ""
    """Of the machine's system: containers on one machine have different host names and the same boot."""
    started: str = ""
    """Of the process, because process numbers come again."""

    @classmethod
    def this_process(cls) -> Holder:
        """Ourselves, now."""
        since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
        pid = os.getpid()
        return cls(Path(sys.argv[0]).name or "python", pid, platform.node(), since, _boot(), _started(pid))

    @property
    def is_elsewhere(self) -> bool:
        """Whether its machine is another one."""
        return self.host != platform.node() and (not self.boot or self.boot != _boot())

    @property
    def may_live(self) -> bool:
        """Whether its process runs here, or may run where we cannot look."""
        if self.host != platform.node():
            return True
        return self.boot == _boot() and _runs(self.pid) and self.started == _started(self.pid)

    def __str__(self) -> str:
        return f"{self.command} (process {self.pid} on {self.host}, since {self.since})"


def lock_beside(folder: Path, part: str = "") -> Path:
    """The lock of a folder, or of a part of it; outside, because folders are removed and made again."""
    return folder.parent / FOLDER / f"{folder.name}{part and '__'}{part}.lock"


@contextmanager
def hold(path: Path, work: str, wait_s: float = 0.0, inherited: bool = False) -> Iterator[int | None]:
    """Holds a lock while the block runs; yields its descriptor, None where the system has no locks (Windows).

    Locks of dead processes of this machine are taken over, those of other machines are not. Forked workers do not
    hold it.

    Args:
        path: file of the lock; it appears, and goes when the lock is released.
        work: what is locked, for the message to others: "fold 0 of …".
        wait_s: how long to wait for others.
        inherited: the descriptor is handed to commands (`pass_fds`), which then hold the lock as well, also after this
            process; the file stays.

    Raises:
        InvalidInput: somebody else holds it, or the folder cannot be written to.
    """
    if fcntl is None:
        yield None
        return
    missing = [folder for folder in path.parents if not folder.exists()]
    descriptor, owner = _acquire(path, work, wait_s), os.getpid()
    _held.add(descriptor)
    try:
        yield descriptor
    finally:
        if os.getpid() == owner:
            _held.discard(descriptor)
            _release(path, descriptor, inherited, missing)


def holder_of(path: Path) -> Holder | None:
    """Who seems to hold a lock, for messages; None where nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        holder = _read(descriptor)
    finally:
        os.close(descriptor)
    return holder if holder is not None and holder.may_live else None


# ------------------------------------------------------------------------------------------------------------- taking


def _acquire(path: Path, work: str, wait_s: float) -> int:
    until, said = time.monotonic() + wait_s, False
    while True:
        got = _try(path)
        if isinstance(got, int):
            return got
        if time.monotonic() >= until:
            raise InvalidInput(_taken(path, work, got.by))
        if not said:
            logger.info("waiting for %s, which works on %s (%s)", got.by or "another process", work, path)
            said = True
        time.sleep(LOOK_EVERY_S)


@dataclass(frozen=True)
class _Taken:
    by: Holder | None


def _try(path: Path) -> int | _Taken:
    """Descriptor of the lock with our record in it, or who has it."""
    while True:
        descriptor = _open(path)
        try:
            locked = _flock(path, descriptor)
            before = _read(descriptor)
            if locked is None or (before is not None and (before.is_elsewhere if locked else before.may_live)):
                os.close(descriptor)
                return _Taken(before)
            if not _is_at(path, descriptor):  # its holder removed it just now
                os.close(descriptor)
                continue
            if before is not None:
                logger.info("taking over from %s, which ended without finishing", before)
            _write(descriptor, json.dumps(asdict(Holder.this_process())))
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        return descriptor


def _open(path: Path, attempts: int = 10) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:  # another command removed the empty folder just now
        if attempts == 0:
            raise
        return _open(path, attempts - 1)
    except OSError as error:
        if error.errno not in NO_ACCESS:
            raise
        by = holder_of(path)
        found = f"the lock cannot be made ({error.strerror})" + (f"; {by} made it" if by else "")
        fix = "change the permissions, or choose another --workspace or output folder"
        raise InvalidInput(Problem(found, "a folder that this user may write to", fix, file=path)) from error


def _flock(path: Path, descriptor: int) -> bool | None:
    """True: ours; None: somebody else's; False: this drive knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _say_once(
            "the drive of %s knows no locks (%s): commands of this machine are told apart by their process numbers; "
            "see to it yourself that no other machine does the same work",
            str(path.parent),
            str(error.strerror),
        )
        return False
    return True


@cache
def _say_once(text: str, *values: str) -> None:
    logger.warning(text, *values)


def _taken(path: Path, work: str, by: Holder | None) -> Problem:
    who, fix = str(by or "another process"), "wait for it, or end it; then run the command again"
    if by is not None and by.is_elsewhere:
        fix = (
            f"wait for it, or end it on {by.host}; if it runs there no more, delete the file and run the command again"
        )
    elif by is not None and not by.may_live:
        who += " has ended, but a process that it started still works"
        return Problem(f"{who} on {work}", "one at a time: they would write to the same files", fix, file=path)
    return Problem(f"{who} works on {work}", "one at a time: they would write to the same files", fix, file=path)


# ---------------------------------------------------------------------------------------------------------- releasing

_held: set[int] = set()
"""Descriptors of this process."""


def _let_go_in_child() -> None:
    """A forked worker would keep the lock of a killed command."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def _release(path: Path, descriptor: int, inherited: bool, made: list[Path]) -> None:
    with suppress(OSError):  # a full or vanished drive must not hide what ended the block
        if inherited:
            _write(descriptor, "")
        elif _is_at(path, descriptor):
            path.unlink()
    os.close(descriptor)
    for folder in made if path.parent.name != FOLDER else dict.fromkeys([path.parent, *made]):
        with suppress(OSError):
            folder.rmdir()  # those that hold something stay


# ------------------------------------------------------------------------------------------------------------- record


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _read(descriptor: int) -> Holder | None:
    """None: empty, or cut off while it was written."""
    try:
        return Holder(**json.loads(os.pread(descriptor, MAX_RECORD_BYTES, 0)))
    except (ValueError, TypeError):
        return None


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _started(pid: int) -> str:
    """Clock ticks from the machine's start to the process's; empty where unknown, and for one that has ended."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if fields[0] == "Z" else fields[19]
    return ""


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
