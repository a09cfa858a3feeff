"""A file of 2D weights as users bring them, but tiny: a residual network with the names that torchvision gives."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

WIDTHS = (4, 4, 6, 8, 8)
"""Of the features at strides 2, 4, 8, 16 and 32."""


def tiny_resnet_weights(in_channels: int = 3, bottleneck: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """One block per stage; with the classifier at its end, which nobody needs."""
    draw = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def convolution(name: str, to: int, given: int, kernel: int) -> None:
        state[f"{name}.weight"] = torch.randn(to, given, kernel, kernel, generator=draw) / (given * kernel**2) ** 0.5

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=draw)
        state[f"{name}.bias"] = 0.1 + 0.1 * torch.randn(width, generator=draw)
        state[f"{name}.running_mean"] = 0.1 * torch.randn(width, generator=draw)
        state[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=draw)
        state[f"{name}.num_batches_tracked"] = torch.tensor(1)

    convolution("conv1", WIDTHS[0], in_channels, 7)
    norm("bn1", WIDTHS[0])
    given = WIDTHS[0]
    for stage, width in enumerate(WIDTHS[1:], 1):
        block = f"layer{stage}.0"
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        for index, kernel in enumerate(kernels, 1):
            convolution(f"{block}.conv{index}", width, given if index == 1 else width, kernel)
            norm(f"{block}.bn{index}", width)
        if stage > 1 or given != width:
            convolution(f"{block}.downsample.0", width, given, 1)
            norm(f"{block}.downsample.1", width)
        given = width
    state["fc.weight"], state["fc.bias"] = torch.zeros(10, given), torch.zeros(10)
    return state


@cache
def tiny_weights_file() -> Path:
    """The weights as a file, made once in a process and gone with it."""
    _FOLDERS.append(TemporaryDirectory(prefix="autossl-tiny-weights-"))
    path = Path(_FOLDERS[-1].name) / "tiny_resnet.pth"
    torch.save(tiny_resnet_weights(), path)
    return path


_FOLDERS: list[TemporaryDirectory[str]] = []
