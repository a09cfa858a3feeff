"""The exponential moving average of a network's weights, as a teacher."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def ema_decay(step: int, decay_max: float, ramp_in: bool = True) -> float:
    """min(1 - 1 / (step + 1), decay_max): the plain average of all students so far until decay_max is reached.

    Source: Tarvainen and Valpola 2017 (the ramp-in as in its released code).
    """
    return min(1.0 - 1.0 / (step + 1), decay_max) if ramp_in else decay_max


class EMATeacher:
    """A copy of a student that follows it. `network` belongs into `Parts.followers`; its weights stay float32."""

    def __init__(self, student: nn.Module, decay_max: float) -> None:
        self.decay_max = decay_max
        self.network = copy.deepcopy(student).float().eval()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int, ramp_in: bool = True) -> None:
        """teacher ← decay·teacher + (1 - decay)·student; buffers are copied. `step` counts from 0."""
        self.follow(student, ema_decay(step, self.decay_max, ramp_in))

    @torch.no_grad()
    def follow(self, student: nn.Module, decay: float) -> None:
        """The same with a decay of one's own."""
        teacher_weights = [weight.detach() for weight in self.network.parameters()]
        student_weights = [weight.detach().float() for weight in student.parameters()]
        torch._foreach_lerp_(teacher_weights, student_weights, 1.0 - decay)
        for mine, theirs in zip(self.network.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def copy_from(self, student: nn.Module) -> None:
        """Takes the student's weights as they are."""
        self.network.load_state_dict(student.state_dict())

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Full-resolution logits [N, C, *S], no gradient."""
        z = self.network(x)
        return (z if isinstance(z, Tensor) else z[0]).float()
