"""Activations of a plan's networks, where PyTorch's own cost more than they need to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class LeakyReLU(nn.LeakyReLU):
    """The same bits as PyTorch's, in place or not, without the copies that training in place costs.

    What instance normalization gives is a view, and autograd answers a change in place of a view with copies of the
    whole tensor, 5 % of a training step. Here nothing is changed in place, and the output alone is kept for the
    backward pass: its signs are those of the input. So no more memory is held.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Of any shape."""
        if self.negative_slope > 0 and torch.is_grad_enabled() and input.requires_grad:
            found: Tensor = _OfOutput.apply(input, self.negative_slope)
            return found
        return super().forward(input)


class _OfOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        y = functional.leaky_relu(x, slope)
        ctx.save_for_backward(y)
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.leaky_relu_backward(gradient, y, ctx.slope, True), None
