"""Layers of a plan's networks that cost less than PyTorch's own, and the memory layout in which they are fast."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Dimensions of a batch or kernel → layout."""


def to_channels_last(module: nn.Module) -> None:
    """Stores the kernels of all convolutions channels last; their outputs follow. Values and names stay.

    On a CPU convolutions are faster so (their own kernels need no reordering), as long as nothing between them asks for
    another layout; `InstanceNorm2d` and `InstanceNorm3d` of this module do not.
    """
    for parameter in module.parameters():
        if parameter.ndim in _CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.ndim])


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


class InstanceNorm2d(nn.InstanceNorm2d):
    """PyTorch's, and for input that lies channels last on a CPU a path that keeps it so."""

    slope: float | None = None
    """Of the LeakyReLU that `join_activations` made part of it."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, y, x)."""
        return _per_sample(self, input) if _can_stay(self, input) else _activated(super().forward(input), self.slope)


class InstanceNorm3d(nn.InstanceNorm3d):
    """PyTorch's, and for input that lies channels last on a CPU a path that keeps it so."""

    slope: float | None = None
    """Of the LeakyReLU that `join_activations` made part of it."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, z, y, x)."""
        return _per_sample(self, input) if _can_stay(self, input) else _activated(super().forward(input), self.slope)


def join_activations(network: nn.Module) -> None:
    """A LeakyReLU right behind an instance normalization becomes part of it; values, weights and their names stay.

    Sample by sample the activation finds its input in the processor's cache, and one tensor less is made.
    """
    for sequence in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for at, (norm, activation) in enumerate(pairwise(list(sequence))):
            if isinstance(norm, InstanceNorm2d | InstanceNorm3d) and isinstance(activation, LeakyReLU):
                norm.slope = activation.negative_slope
                sequence[at + 1] = nn.Identity()


def _activated(x: Tensor, slope: float | None) -> Tensor:
    return x if slope is None else LeakyReLU(slope)(x)


def _can_stay(norm: InstanceNorm2d | InstanceNorm3d, x: Tensor) -> bool:
    """Whether `_per_sample` can take it; a compiler fuses PyTorch's own better."""
    usual = (
        norm.affine and not norm.track_running_stats and x.device.type == "cpu" and not torch.compiler.is_compiling()
    )
    layout = _CHANNELS_LAST.get(x.ndim)
    return usual and layout is not None and not x.is_contiguous() and x.is_contiguous(memory_format=layout)


def _per_sample(norm: InstanceNorm2d | InstanceNorm3d, x: Tensor) -> Tensor:
    found: Tensor = _ChannelsLastNorm.apply(x, norm.weight, norm.bias, norm.eps, norm.slope)
    return found


class _ChannelsLastNorm(torch.autograd.Function):
    """Instance normalization as batch normalization of one sample at a time.

    PyTorch's own copies its input to channels first, where samples and channels can be one axis, and so makes the next
    convolution copy it back. Batch normalization reads channels last as it is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float | None) -> Tensor:
        y = torch.empty_like(x)
        means, inverse_stds = (x.new_empty(x.shape[:2]) for _ in range(2))
        for sample, out, mean, inverse_std in zip(x.split(1), y.split(1), means, inverse_stds, strict=True):
            torch.ops.aten.native_batch_norm.out(
                sample, weight, bias, None, None, True, 0.0, eps, out=out, save_mean=mean, save_invstd=inverse_std
            )
            if slope is not None:
                functional.leaky_relu_(out, slope)
        ctx.save_for_backward(x, weight, means, inverse_stds, *(() if slope is None else (y,)))
        ctx.eps, ctx.slope = eps, slope
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, means, inverse_stds, *activated = ctx.saved_tensors
        layout = _CHANNELS_LAST[x.ndim]

        def of_sample(at: int) -> tuple[Tensor, Tensor, Tensor]:
            g, given = gradient[at : at + 1], (means[at], inverse_stds[at])
            if activated:
                g = torch.ops.aten.leaky_relu_backward(g, activated[0][at : at + 1], ctx.slope, True)
            g, sample = g.contiguous(memory_format=layout), x[at : at + 1]
            found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
                g, sample, weight, None, None, *given, True, ctx.eps, [True, True, True]
            )
            return found

        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            of_x, of_weight, of_bias = zip(*map(of_sample, range(len(x))), strict=True)
            return torch.cat(of_x), torch.stack(of_weight).sum(0), torch.stack(of_bias).sum(0), None, None
        whole, of_weights, of_biases = torch.empty_like(x), torch.empty_like(means), torch.empty_like(means)
        for at in range(len(x)):
            found = of_sample(at)
            for target, value in zip((whole[at : at + 1], of_weights[at], of_biases[at]), found, strict=True):
                target.copy_(value)  # while it is in the processor's cache
        return whole, of_weights.sum(0), of_biases.sum(0), None, None
