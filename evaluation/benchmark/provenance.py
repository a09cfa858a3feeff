"""Where figures come from: the package's commit, the machine."""

from __future__ import annotations

import os
import platform

from autossl.data.provenance import package_commit

__all__ = ["machine", "package_commit"]


def machine(device: str) -> str:
    """In words, without names."""
    import torch

    cores = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return f"{cores}{gpu}, torch {torch.__version__}"
