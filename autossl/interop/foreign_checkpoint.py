"""Checkpoints that another program's `torch.save` wrote: tensors and plain values are read, nothing is executed.

A checkpoint names what is to be called while it is read. Here every name must stand on a short list, before anything is
read; torch's own restricted reader then sees the same list. Real nnU-Net checkpoints hold NumPy scalars (the scores in
their log). NumPy's functions for these are never called: small ones of ours take their names, know numbers alone, and
give plain ones.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autossl.data.problems import InvalidInput, Problem
from autossl.interop.archive_files import check_stored_only

MAX_PICKLE_BYTES = 64 << 20
"""Of what describes the tensors; a checkpoint of nnU-Net has 50 KB, and some more for a long log."""
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


class NumberType:
    """Takes the place of `numpy.dtype`: the types of plain numbers in little-endian order, and no others."""

    CODES = frozenset(["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"])

    def __init__(self, code: object, *_: object) -> None:
        if code not in self.CODES:
            raise pickle.UnpicklingError(f"numpy.dtype of {code!r}")
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: object) -> None:
        """What follows in the file: version, byte order, and fields that numbers do not have."""
        parts = state if isinstance(state, tuple) else ()
        if len(parts) < 5 or parts[1] not in ("<", "|", "=") or any(part is not None for part in parts[2:5]):
            raise pickle.UnpicklingError("a numpy.dtype that is no plain number's")


def number_of(dtype: object, content: object) -> int | float | bool:
    """Takes the place of NumPy's `scalar`: the bytes of one number as Python's."""
    if not isinstance(dtype, NumberType) or not isinstance(content, bytes) or len(content) != dtype.dtype.itemsize:
        raise pickle.UnpicklingError("a NumPy scalar that is no plain number")
    number: int | float | bool = np.frombuffer(content, dtype.dtype)[0].item()
    return number


STAND_INS: dict[str, Any] = {
    "numpy.dtype": NumberType,
    "numpy.core.multiarray.scalar": number_of,
    "numpy._core.multiarray.scalar": number_of,
}
"""Name in the file → what is called instead; NumPy 2 renamed the module."""


def read_foreign_checkpoint(path: Path) -> dict[str, Any]:
    """All of a checkpoint, tensors on the CPU and mapped from the file; NumPy scalars become plain numbers.

    Raises:
        InvalidInput: the file is missing, damaged or compressed inside, names what would have to be executed (all such
            names are told), or holds no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInput(Problem("there is no such file", EXPECTED, "check the path", file=path))
    try:
        check_stored_only(path)
    except InvalidInput as error:
        raise InvalidInput([replace(problem, fix=FIX) for problem in error.problems]) from error
    refused = refused_names(path)
    if refused:
        found = f"it would have to execute {', '.join(refused)}"
        raise InvalidInput(Problem(found, EXPECTED, FIX, file=path))
    allowed: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever damaged or hostile content provokes in torch's reader
        lines = str(error).splitlines() or [type(error).__name__]
        told = next((line.strip() for line in lines if "numpy" in line.lower()), lines[0])
        found = f"the checkpoint cannot be read ({told[:200]})"
        raise InvalidInput(Problem(found, EXPECTED, FIX, file=path)) from error
    if not isinstance(content, dict):
        raise InvalidInput(Problem(f"a checkpoint that is a {type(content).__name__}", EXPECTED, FIX, file=path))
    return content


def refused_names(path: Path) -> list[str]:
    """Names of what the checkpoint asks to be called and is not on the list, sorted.

    Raises:
        InvalidInput: no checkpoint of torch, or its description is damaged or far too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.count("/") <= 1 and name.endswith("data.pkl")]
            if len(names) != 1 or archive.getinfo(names[0]).file_size > MAX_PICKLE_BYTES:
                found = f"{len(names)} descriptions of tensors in it, or one that is too large"
                raise InvalidInput(Problem(found, "a file that torch.save wrote", FIX, file=path))
            asked = set(_names_in(archive.read(names[0])))
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        found = f"the checkpoint cannot be read ({str(error)[:200]})"
        raise InvalidInput(Problem(found, "a file that torch.save wrote", FIX, file=path)) from error
    return sorted(asked - TORCH_NAMES - set(STAND_INS))


def _names_in(content: bytes) -> Iterator[str]:
    """What a pickle names; ways to name that torch's writer does not take count as names of their own."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield f"something by {operation.name}"
