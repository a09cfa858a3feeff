"""Checkpoints: tensors, numbers, strings, lists and dicts, written whole or not at all, read back before they count.

A fold that is being trained keeps two: `checkpoint_latest.pth`, and `checkpoint_previous.pth` from before it, in case
the latest is found damaged later. A finished fold keeps `checkpoint_final.pth` alone.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autossl.data.checksums import zip_damage
from autossl.data.files import atomic_write, crash_point, sync_file
from autossl.data.problems import InvalidInput
from autossl.data.runs import CHECKPOINT_FINAL, CHECKPOINT_LATEST, CHECKPOINT_PREVIOUS
from autossl.inference.checkpoint import read_checkpoint
from autossl.trainers.base import Parts

logger = logging.getLogger(__name__)

DAMAGED = "damaged_"

FORMAT = "autossl-checkpoint-1"


def parts_state(parts: Parts) -> dict[str, Any]:
    """`networks` (trained parts and followers by name) and `memory` of a method."""
    modules = {**parts.trained, **parts.followers}
    return {
        "networks": {name: module.state_dict() for name, module in modules.items()},
        "memory": {
            name: value.state_dict() if isinstance(value, nn.Module) else value for name, value in parts.memory.items()
        },
    }


def load_parts_state(parts: Parts, state: dict[str, Any]) -> None:
    """Puts back what `parts_state` gave; modules keep their identity, plain memory entries are replaced."""
    modules = {**parts.trained, **parts.followers}
    for name, module in modules.items():
        module.load_state_dict(state["networks"][name])
    for name, value in parts.memory.items():
        loaded = state["memory"][name]
        if isinstance(value, nn.Module):
            value.load_state_dict(loaded)
        elif isinstance(value, Tensor):
            value.copy_(loaded)
        else:
            parts.memory[name] = loaded


def write_checkpoint(path: Path, content: dict[str, Any], keep_as: Path | None = None) -> None:
    """Writes atomically what must load with `weights_only=True`; the same content gives the same bytes.

    The new file is read back from the disk before it takes the place of the old one.

    Args:
        path: of the checkpoint.
        content: tensors, numbers, strings, lists and dicts.
        keep_as: where the file that `path` holds now goes.

    Raises:
        OSError: (EIO) what was written cannot be read back; the files of before are as they were.
    """
    with atomic_write(path) as partial:
        with partial.open("wb") as file:  # given a path, torch writes that name into the file
            torch.save({"format": FORMAT, **content}, file)
        _read_back(partial, path)
        if keep_as is not None and path.exists():
            path.replace(keep_as)
            crash_point()


def _read_back(partial: Path, path: Path) -> None:
    sync_file(partial)
    if hasattr(os, "posix_fadvise"):  # from the disk, not from memory
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    damage = zip_damage(partial)
    if damage is not None:
        found = f"what was just written cannot be read back ({damage}): check the disk; the checkpoints of before stay"
        raise OSError(errno.EIO, found, str(path))


def write_latest(folder: Path, state: dict[str, Any]) -> None:
    """Writes the fold's latest checkpoint; the one of before stays beside it."""
    write_checkpoint(folder / CHECKPOINT_LATEST, state, keep_as=folder / CHECKPOINT_PREVIOUS)


def write_final(folder: Path, state: dict[str, Any]) -> None:
    """Writes the fold's final checkpoint, which makes it finished, and removes the others."""
    write_checkpoint(folder / CHECKPOINT_FINAL, state)
    remove_earlier(folder)


def remove_earlier(folder: Path) -> None:
    """Removes what a finished fold does not need any more."""
    for name in (CHECKPOINT_LATEST, CHECKPOINT_PREVIOUS):
        (folder / name).unlink(missing_ok=True)
        (folder / f"{DAMAGED}{name}").unlink(missing_ok=True)


def read_newest(folder: Path) -> dict[str, Any] | None:
    """The state to go on from: the latest checkpoint, or the one before where it is damaged; None where none is there.

    A damaged one is named and set aside, so that it does not take the place of a good one.

    Raises:
        InvalidInput: checkpoints are there, and all are damaged.
    """
    problems = []
    for name in (CHECKPOINT_LATEST, CHECKPOINT_PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            state = read_checkpoint(path)
        except InvalidInput as error:
            problems += list(error.problems)
            continue
        for problem in problems:
            logger.warning("%s: %s; going on from %s", problem.file, problem.found, name)
        if problems:
            (folder / CHECKPOINT_LATEST).replace(folder / f"{DAMAGED}{CHECKPOINT_LATEST}")
        return state
    if problems:
        title = "the fold cannot go on from its checkpoints; start it again with --overwrite, or put back good ones:"
        raise InvalidInput(problems, title=title)
    return None
