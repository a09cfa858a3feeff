"""Weights to start from, with a report of what matched by name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autossl.data.problems import InvalidInput, Problem
from autossl.inference.checkpoint import read_checkpoint
from autossl.trainers.base import Parts


@dataclass(frozen=True)
class InitReport:
    """What happened to the weights of one part; names as in its state dict."""

    part: str
    loaded: tuple[str, ...]
    other_shape: tuple[str, ...]
    not_in_file: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.part}: {len(self.loaded)} weights taken over"
        for words, names in (("of another shape", self.other_shape), ("not in the file", self.not_in_file)):
            if names:
                text += f", {len(names)} {words} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        return text


def load_initial_weights(parts: Parts, path: Path) -> list[InitReport]:
    """Puts the weights of a checkpoint's first predicting network into every trained part and follower that fits.

    A part of the same name in the file is preferred. Weights of another shape (a head for other classes) stay fresh.

    Raises:
        InvalidInput: not one of our checkpoints, or no weight of any part matched.
    """
    content = read_checkpoint(path)
    networks: Mapping[str, Mapping[str, Tensor]] = content["networks"]
    first = networks[content["prediction"]["members"][0]["name"]]
    reports = [
        _load(name, module, networks.get(name, first)) for name, module in {**parts.trained, **parts.followers}.items()
    ]
    if not any(report.loaded for report in reports):
        names = ", ".join(report.part for report in reports)
        raise InvalidInput(
            Problem(
                f"no weight of {names} has its name and shape in the file",
                "a checkpoint of a network like the plan's",
                "give a checkpoint of the same configuration and preset, or leave out --init",
                file=path,
            )
        )
    return reports


@torch.no_grad()
def _load(part: str, module: nn.Module, weights: Mapping[str, Tensor]) -> InitReport:
    own = module.state_dict()
    fitting = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    module.load_state_dict({**own, **fitting})
    return InitReport(
        part,
        loaded=tuple(fitting),
        other_shape=tuple(name for name in own if name in weights and name not in fitting),
        not_in_file=tuple(name for name in own if name not in weights),
    )
