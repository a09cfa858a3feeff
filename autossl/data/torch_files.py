"""Files of `torch.save` from strangers: what they would call, and what memory they would take, is known before reading.

Such a file is a zip of tensors and a pickle that describes them. A pickle names what is to be called while it is read;
here every name must stand on a short list. torch's own restricted reader knows more names (`bytearray` of any size
among them), so it comes second.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autossl.data.archive_files import check_stored_only
from autossl.data.problems import InvalidInput, Problem

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE_BYTES = 4 << 20
"""Of what describes the tensors; a checkpoint of nnU-Net has 50 KB, ours up to some 100. It takes seconds to read."""
SMALL_BYTES = 64 << 20
"""Tensors up to this size may repeat the bytes that are stored for them."""
EXPECTED = "a checkpoint of tensors, numbers, texts, lists and dictionaries"
FIX = "do not use it; ask its author for one that holds nothing else, or copy the file again"
STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
DTYPES = ("float16", "bfloat16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
TORCH_NAMES = frozenset(
    [
        "collections.OrderedDict",
        "_codecs.encode",  # how bytes are written in the pickle protocol that torch uses; torch's reader has its own
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.Size",
        "torch.device",
        *(f"torch.{name}Storage" for name in STORAGES),
        *(f"torch.{name}" for name in DTYPES),
    ]
)
"""What torch's reader may build of its own."""


def check_torch_file(path: Path, further: Collection[str] = ()) -> None:
    """Whether reading the file calls only what is on the list and takes no more memory than its size.

    Args:
        path: of the file.
        further: names that the caller reads with stand-ins of its own.

    Raises:
        InvalidInput: it is damaged or compressed inside, or names what would have to be executed (all are told).
    """
    try:
        check_stored_only(path)
    except InvalidInput as error:
        told = [replace(p, found=_unreadable(p.found), expected=EXPECTED, fix=FIX) for p in error.problems]
        raise InvalidInput(told) from error
    refused = sorted(_asked(path) - TORCH_NAMES - set(further))
    if refused:
        shown = ", ".join(name[:80] for name in refused[:8]) + (", …" if len(refused) > 8 else "")
        found = f"it holds objects that would have to be executed: {shown}"
        raise InvalidInput(Problem(found, EXPECTED, FIX, file=path))


def check_tensors(content: Any, path: Path) -> None:
    """Whether no large tensor claims more numbers than are stored for it: a copy of one would take any memory.

    Raises:
        InvalidInput: with the first that does.
    """
    seen: set[int] = set()
    left = [content]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        elif hasattr(value, "untyped_storage") and _is_oversized(value):
            stored = value.untyped_storage().nbytes()
            found = f"a tensor of shape {tuple(value.shape)}, for which {stored:,} bytes are stored"
            raise InvalidInput(Problem(found, "tensors that are stored as a whole", FIX, file=path))


def refused_names(path: Path, further: Collection[str] = ()) -> list[str]:
    """Names of what the file asks to be called and is not on the list, sorted.

    Raises:
        InvalidInput: no file of torch.save, or its description is damaged or far too large.
    """
    return sorted(_asked(path) - TORCH_NAMES - set(further))


def _asked(path: Path) -> set[str]:
    expected = "a file that torch.save wrote"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.count("/") <= 1 and name.endswith("data.pkl")]
            if len(names) != 1 or archive.getinfo(names[0]).file_size > MAX_PICKLE_BYTES:
                found = _unreadable(f"{len(names)} descriptions of tensors in it, or one that is too large")
                raise InvalidInput(Problem(found, expected, FIX, file=path))
            return set(_names_in(archive.read(names[0])))
    except (zipfile.BadZipFile, ValueError, OSError, LookupError, RuntimeError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(Problem(_unreadable(str(error)[:200]), expected, FIX, file=path)) from error


def _names_in(content: bytes) -> Iterator[str]:
    """What a pickle names; ways to name that torch's writer does not take count as names of their own."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield f"something by {operation.name}"


def _unreadable(reason: str) -> str:
    return f"the checkpoint cannot be read ({reason})"


def _is_oversized(tensor: Tensor) -> bool:
    claimed = tensor.numel() * tensor.element_size()
    return claimed > SMALL_BYTES and claimed > tensor.untyped_storage().nbytes()
