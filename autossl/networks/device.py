"""Which device computes."""

from __future__ import annotations

import torch

from autossl.data.problems import InvalidInput, Problem


def resolve_device(name: str) -> str:
    """The device of a name: "auto" takes CUDA, else Apple's GPU, else the CPU; a named device must exist.

    Raises:
        InvalidInput: with the devices that are there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind, sign, index = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (not sign or index.isdecimal()) and counts.get(kind, 0) > int(index or 0):
        return name
    there = ", ".join(f"{kind} ({count})" for kind, count in counts.items() if count)
    raise InvalidInput(
        Problem(f"device '{name}' does not exist here", f"auto or one of: {there}", "choose one of these")
    )
