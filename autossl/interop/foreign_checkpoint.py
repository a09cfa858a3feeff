"""Checkpoints that another program's `torch.save` wrote: tensors and plain values are read, nothing is executed.

A checkpoint names what is to be called while it is read. Here every name must stand on a short list, before anything is
read; torch's own restricted reader then sees the same list. Real nnU-Net checkpoints hold NumPy scalars (the scores in
their log). NumPy's functions for these are never called: small ones of ours take their names, know numbers alone, and
give plain ones.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autossl.data.problems import InvalidInput, Problem
from autossl.data.torch_files import EXPECTED, FIX, check_tensors, check_torch_file


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
    check_torch_file(path, further=STAND_INS)
    allowed: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever damaged or hostile content provokes in torch's reader
        lines = str(error).splitlines() or [type(error).__name__]
        told = next((line.strip() for line in lines if "numpy" in line.lower()), lines[0])
        found = f"the checkpoint cannot be read ({told[:200]})"
        raise InvalidInput(Problem(found, EXPECTED, FIX, file=path)) from error
    check_tensors(content, path)
    if not isinstance(content, dict):
        raise InvalidInput(Problem(f"a checkpoint that is a {type(content).__name__}", EXPECTED, FIX, file=path))
    return content
