"""Checkpoints: tensors, numbers, strings, lists and dicts, written whole or not at all."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autossl.data.files import atomic_write
from autossl.data.problems import InvalidInput, Problem
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


def read_training_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint of ours without executing anything; raises `InvalidInput` with the reason."""
    expected = "a whole checkpoint written by autossl_train"
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise InvalidInput(Problem("there is no such file", expected, "check the path", file=path)) from error
    except (RuntimeError, EOFError, OSError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "delete it and train this fold again with --resume, or give another file"
        raise InvalidInput(Problem(f"the file cannot be read ({reason})", expected, fix, file=path)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise InvalidInput(Problem(f"its format is {found!r}", f"{FORMAT!r}", "give a checkpoint of autossl", file=path))
    return content
