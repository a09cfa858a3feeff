"""Optimizers of a phase: one per parameter group, with its own schedule and gradient clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autossl.planners.plans import NNUNET_LEARNING_RATE, NNUNET_MOMENTUM
from autossl.trainers.base import ParameterGroup, Parts, Phase, Progress


@dataclass(frozen=True)
class PlannedOptimizer:
    """What the plan says of SGD."""

    learning_rate: float = NNUNET_LEARNING_RATE
    momentum: float = NNUNET_MOMENTUM


@dataclass
class GroupOptimizer:
    """A parameter group with the optimizer that moves it."""

    group: ParameterGroup
    learning_rate: float
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    @property
    def key(self) -> str:
        """Optimizer state is kept across phases, and in checkpoints, under this name."""
        return f"{self.group.prefix}:{self.group.optimizer}"

    @property
    def part(self) -> str:
        """The trained part that the group belongs to."""
        return self.group.prefix.split(".", 1)[0]

    def set_rate(self, at: Progress) -> float:
        """Sets and returns the learning rate of the step."""
        rate = self.learning_rate * self.group.factor(at)
        for entry in self.optimizer.param_groups:
            entry["lr"] = rate
        return rate

    def clip(self) -> Tensor:
        """Clips the gradient norm in place and returns the norm before; 0 where nothing has a gradient."""
        limit = self.group.clip if self.group.clip is not None else float("inf")
        return nn.utils.clip_grad_norm_(self.parameters, limit)

    @property
    def has_gradient(self) -> bool:
        """Whether any parameter got a gradient in this step."""
        return any(parameter.grad is not None for parameter in self.parameters)


def default_groups(parts: Parts) -> tuple[ParameterGroup, ...]:
    """One group with nnU-Net's optimizer per trained part that has parameters."""
    return tuple(
        ParameterGroup(name) for name, module in parts.trained.items() if any(True for _ in module.parameters())
    )


def group_optimizers(
    parts: Parts,
    phase: Phase,
    previous: Sequence[GroupOptimizer] = (),
    planned: PlannedOptimizer = PlannedOptimizer(),
) -> list[GroupOptimizer]:
    """The optimizers of a phase; groups that the phase before had with the same optimizer keep their state.

    Raises:
        ValueError: a prefix matches no parameter, or a parameter lies in two groups.
    """
    named = {
        f"{part}.{name}": parameter
        for part, module in parts.trained.items()
        for name, parameter in module.named_parameters()
    }
    kept = {entry.key: entry for entry in previous if entry.part not in phase.reinitialize}
    taken: set[int] = set()
    result = []
    for group in phase.groups if phase.groups is not None else default_groups(parts):
        parameters = [p for name, p in named.items() if name == group.prefix or name.startswith(group.prefix + ".")]
        if not parameters:
            raise ValueError(f"phase '{phase.name}': no trained parameter starts with '{group.prefix}'")
        if taken & {id(p) for p in parameters}:
            raise ValueError(f"phase '{phase.name}': '{group.prefix}' shares parameters with another group")
        taken |= {id(p) for p in parameters}
        rate = planned.learning_rate if group.learning_rate is None else group.learning_rate
        entry = GroupOptimizer(group, rate, parameters, _optimizer(group, parameters, rate, planned.momentum))
        if entry.key in kept:
            _take_state(entry, kept[entry.key].optimizer.state_dict()["state"])
        result.append(entry)
    return result


def optimizer_states(optimizers: Sequence[GroupOptimizer]) -> dict[str, Any]:
    """Tensors and numbers only: the state of each group's parameters, in order."""
    return {entry.key: entry.optimizer.state_dict()["state"] for entry in optimizers}


def load_optimizer_states(optimizers: Sequence[GroupOptimizer], states: Mapping[str, Any]) -> None:
    """Puts back what `optimizer_states` gave."""
    for entry in optimizers:
        _take_state(entry, states[entry.key])


def _take_state(entry: GroupOptimizer, state: Any) -> None:
    """Momentum and the like alone: rate and weight decay are those of the entry's own group."""
    entry.optimizer.load_state_dict({**entry.optimizer.state_dict(), "state": state})


def _optimizer(
    group: ParameterGroup, parameters: list[nn.Parameter], rate: float, momentum: float
) -> torch.optim.Optimizer:
    if group.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=group.weight_decay)
    return torch.optim.SGD(
        parameters, lr=rate, momentum=momentum, nesterov=momentum > 0, weight_decay=group.weight_decay
    )
