"""Deterministic operations on CUDA, for runs that are to be repeated to the bit. On a CPU they are so by themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autossl.data.problems import InvalidInput, Problem

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic_operations(wanted: bool) -> Iterator[None]:
    """Allows deterministic operations alone while the block runs; afterwards all is as before.

    Raises:
        InvalidInput: the block needs an operation that has no deterministic form on its device.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")  # cuBLAS reads it when it is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        operation = str(error).split(" does not have")[0].split()[-1]
        raise InvalidInput(
            Problem(
                f"the operation {operation} has no deterministic form on this device",
                "deterministic operations alone (--deterministic)",
                "leave out --deterministic, train on the CPU, or choose another method",
            )
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
