"""Checkpoints: tensors, numbers, strings, lists and dicts, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autossl.data.files import atomic_write
from autossl.trainers.base import Parts

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


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes atomically; `content` must load with `weights_only=True`."""
    with atomic_write(path) as partial:
        torch.save({"format": FORMAT, **content}, partial)
