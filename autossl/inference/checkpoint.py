"""Reads what predicts out of a checkpoint: weights and a `PredictionSpec`. Nothing in the file is executed."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autossl.data.checksums import zip_damage
from autossl.data.problems import InvalidInput, Problem
from autossl.data.torch_files import check_tensors, check_torch_file
from autossl.networks.prediction import PredictionSpec

FORMAT = "autossl-checkpoint-1"
FOREIGN = "models of nnU-Net come in with autossl_import_nnunet"
_EXPECTED = "a whole checkpoint written by autossl_train"
_UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    KeyError,
    ValueError,
    AttributeError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class TrainedNetworks:
    """What one fold's checkpoint holds for prediction."""

    spec: PredictionSpec
    networks: Mapping[str, Mapping[str, Tensor]]
    """Network name → state dict; those that the spec's members are made of, on the CPU, read when they are used."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All of a checkpoint, tensors mapped from the file; all of it is read once, to compare it with its checksums.

    Raises:
        InvalidInput: the file is missing, cut off, changed, holds objects that would have to be executed, or is not
            ours.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInput(Problem("there is no such file", _EXPECTED, "check the path", file=path))
    check_torch_file(path)
    damage = zip_damage(path)
    if damage is not None and zipfile.is_zipfile(path):
        raise InvalidInput(
            Problem(
                f"the checkpoint is damaged: {damage}",
                _EXPECTED,
                "copy the file again, or train this fold again",
                file=path,
            )
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _UNREADABLE as error:
        foreign = isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error)
        reason = "it holds objects that would have to be executed" if foreign else _first_line(error)
        fix = f"use a checkpoint of autossl; {FOREIGN}" if foreign else "train this fold again, or copy the file again"
        raise InvalidInput(Problem(f"the checkpoint cannot be read ({reason})", _EXPECTED, fix, file=path)) from error
    check_tensors(content, path)
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        found = found[:80] if isinstance(found, str) else type(found)  # others could be endless when shown
        raise InvalidInput(
            Problem(
                f"the checkpoint's format is {found!r}",
                f"{FORMAT!r}",
                f"use a checkpoint of autossl; {FOREIGN}",
                file=path,
            )
        )
    return content


def read_trained_networks(path: Path, channels: Collection[int] | None = None) -> TrainedNetworks:
    """The prediction of a checkpoint and the weights of its members.

    Args:
        path: of the checkpoint.
        channels: the prediction that looks at these image channels and no others; None: the deployed one.

    Raises:
        InvalidInput: as `read_checkpoint`, or the prediction is missing or asks for what is not there.
    """
    content = read_checkpoint(path)
    specs = _predictions(content, path, alternatives=channels is not None)
    spec = next((spec for spec in specs if channels is None or spec.channels == frozenset(channels)), None)
    if spec is None:
        raise InvalidInput(
            Problem(
                f"nothing in it predicts from the channels {sorted(channels or ())} alone",
                "a network that sees just these",
                "predict without --modality, or train semi_cml or supervised with --set channels=…",
                file=path,
            )
        )
    networks = content.get("networks")
    names = [name for member in spec.members for name in member.parts]
    missing = [name for name in names if not isinstance(networks, dict) or not _is_state(networks.get(name))]
    if missing:
        raise InvalidInput(
            Problem(f"no weights for network {', '.join(missing)}", _EXPECTED, "train this fold again", file=path)
        )
    return TrainedNetworks(spec, {name: content["networks"][name] for name in names})


def separate_channels(path: Path) -> list[frozenset[int]]:
    """The sets of channels from which something in the checkpoint predicts alone.

    Raises:
        InvalidInput: as `read_trained_networks`.
    """
    specs = _predictions(read_checkpoint(path), path, alternatives=True)
    return list(dict.fromkeys(spec.channels for spec in specs if spec.channels is not None))


def _predictions(content: Mapping[str, Any], path: Path, alternatives: bool) -> list[PredictionSpec]:
    """The deployed prediction, then its alternatives where asked for."""
    others = content.get("alternatives") if alternatives else None
    try:
        given = [content.get("prediction"), *(others.values() if isinstance(others, dict) else ())]
        return [PredictionSpec.from_json(spec) for spec in given]
    except InvalidInput as error:
        raise InvalidInput([Problem(p.found, p.expected, p.fix, file=path) for p in error.problems]) from error


def _is_state(state: Any) -> bool:
    return isinstance(state, dict) and bool(state) and all(isinstance(value, Tensor) for value in state.values())


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
