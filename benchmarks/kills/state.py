"""What a workspace holds, as one digest per file, without what tells of the time: to compare two ways to one state."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch

TIMES = frozenset(
    {
        "written",
        "seconds",
        "started",
        "finished",
        "hours",
        "attempts",
        "steps_per_second",
        "data_wait_share",
        "memory_mb",
        "checksum",
        "jobs",
        "estimates",
        "file_stamps",
        "machine",
        "made_from",
        "checkpoint",
    }
)
"""Entries of JSON that tell how long something took, or when and where it was done; the last two are hashes of files
that hold such entries, and are compared themselves."""
UNCOMPARED = (".png", ".html", ".log", ".txt", ".lock", ".pdf")
"""Pictures and pages show times; they only have to be there."""
CALLS = "benchmark.json"
"""How long each call that trained a fold took: a caller that was killed could not write it."""
REMNANTS = (".partial-", ".removing-")


def state_of(folder: Path) -> dict[str, str]:
    """Relative path → digest of the content, for every file below a folder that a user would see and need."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        aside = any(part.startswith(".") or part in ("logs", "tensorboard", CALLS) for part in name.parts)
        if path.is_file() and not aside:
            found[str(name)] = digest_of(path, folder.resolve())
    return found


def remnants_of(folder: Path) -> list[str]:
    """Unfinished files that killed processes left."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name.startswith(REMNANTS))


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What is missing, too much or other than it should be."""
    missing = [f"missing: {name}" for name in expected if name not in found]
    further = [f"not expected: {name}" for name in found if name not in expected]
    return (
        missing
        + further
        + [f"differs: {name}" for name in expected if found.get(name, expected[name]) != expected[name]]
    )


def digest_of(path: Path, root: Path | None = None) -> str:
    """Digest of what a file means: of weights, voxels and values, not of bytes around them or of where `root` lies."""
    if path.name.endswith(UNCOMPARED):
        return "there"
    digest = hashlib.sha256()
    if path.suffix == ".pth":
        _add(digest, torch.load(path, weights_only=True))
    elif path.suffix == ".b2nd":
        array = blosc2.open(str(path), mode="r")
        _add(digest, [np.asarray(array[:]), array.schunk.vlmeta.get("source")])
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as content:
            _add(digest, {name: content[name] for name in content.files})
    elif path.suffix == ".gz":
        digest.update(gzip.decompress(path.read_bytes()))
    elif path.suffix in (".json", ".jsonl"):
        text = path.read_text().replace(str(root), "") if root is not None else path.read_text()
        texts = text.splitlines() if path.suffix == ".jsonl" else [text]
        _add(digest, [_timeless(json.loads(text)) for text in texts])
    else:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _timeless(value: Any) -> Any:
    """JSON without the entries that tell of the time."""
    if isinstance(value, dict):
        return {key: _timeless(entry) for key, entry in value.items() if key not in TIMES}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def _add(digest: Any, value: Any) -> None:
    """Adds a value of plain entries, arrays and tensors, with its type."""
    digest.update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    if isinstance(value, Mapping):
        for key in value:
            digest.update(f"{key}:".encode())
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        for entry in value:
            _add(digest, entry)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.str}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())
