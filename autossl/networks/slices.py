"""2D networks that segment volumes slice by slice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autossl.networks.build import seeded_weights
from autossl.networks.encoders2d import STRIDES, Encoder2D
from autossl.planners.plans import Architecture

WIDTHS = (64, 64, 32, 32)
"""Of the decoder at strides 16, 8, 4 and 2."""
GROUPS = 8


def to_slices(volume: Tensor, axis: int = 0) -> Tensor:
    """[B, c, *S] → [B·S_axis, c, the other two axes]: all slices of the first volume, then those of the next."""
    return volume.movedim(2 + axis, 1).flatten(0, 1)


def to_volume(slices: Tensor, n_volumes: int, axis: int = 0) -> Tensor:
    """Back again: [B·S_axis, c, …] → [B, c, *S]."""
    return slices.unflatten(0, (n_volumes, -1)).movedim(1, 2 + axis)


class SliceWise(nn.Module):
    """A network of planes as a network of volumes.

    Args:
        plane: [N, Ci, Y, X] → [N, C, Y, X].
        multiple: slices are padded at their ends to multiples of it, with 0, and cut to their size again.
    """

    def __init__(self, plane: nn.Module, multiple: int) -> None:
        super().__init__()
        self.plane = plane
        self.multiple = multiple

    def forward(self, volume: Tensor, axis: int = 0) -> list[Tensor]:
        """Logits [B, C, *S] of one level, from [B, Ci, *S] cut into slices along the axis."""
        slices = to_slices(volume, axis)
        y, x = slices.shape[2:]
        padded = functional.pad(slices, (0, -x % self.multiple, 0, -y % self.multiple))
        return [to_volume(self.plane(padded)[..., :y, :x], len(volume), axis)]


class PretrainedUNet(nn.Module):
    """A pretrained encoder and a light decoder: [N, Ci, Y, X] → logits [N, C, Y, X], Y and X multiples of 32.

    From the coarsest features to stride 2: bilinear up-sampling, the encoder's features beside it, one 3×3
    convolution, group norm. There the image itself joins in, its 2×2 voxels as channels, and a transposed convolution
    makes the full resolution.

    Args:
        encoder: gives features at strides 2 to 32.
        channel_std: standard deviation of each image channel; the encoder gets the mean and deviation it expects.
        n_outputs: channels of logits.
        seed: of the decoder's weights; None draws from the global generator.
    """

    def __init__(
        self, encoder: Encoder2D, channel_std: Sequence[float], n_outputs: int, seed: int | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        with seeded_weights(seed):
            self.mapping = ChannelMapping(channel_std, encoder.in_channels)
            self.decoder = _LightDecoder(encoder.channels, encoder.in_channels, n_outputs)

    def forward(self, image: Tensor) -> Tensor:
        """Logits at full resolution."""
        image = self.mapping(image)
        return self.decoder(self.encoder(image * self.encoder.input_std + self.encoder.input_mean), image)


class ChannelMapping(nn.Module):
    """The image's channels as those that an encoder was made for, each with unit variance.

    One channel is repeated; as many as the encoder takes stay as they are; else a 1×1 convolution begins as their mean.
    """

    scale: Tensor

    def __init__(self, channel_std: Sequence[float], wanted: int) -> None:
        super().__init__()
        self.wanted = wanted
        scale = torch.tensor([1 / std for std in channel_std], dtype=torch.float32)
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.convolution: nn.Conv2d | None = None
        if len(channel_std) not in (1, wanted):
            self.convolution = nn.Conv2d(len(channel_std), wanted, 1)
            nn.init.constant_(self.convolution.weight, 1 / len(channel_std))
            nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        """[N, Ci, Y, X] → [N, wanted, Y, X]."""
        scaled = image * self.scale
        if self.convolution is not None:
            return self.convolution(scaled)
        return scaled.expand(-1, self.wanted, -1, -1)


class _LightDecoder(nn.Module):
    """From features at strides 2 to 32 and the image to logits."""

    def __init__(self, channels: Sequence[int], image_channels: int, n_outputs: int) -> None:
        super().__init__()
        below = (channels[-1], *WIDTHS[:-1])
        self.blocks = nn.ModuleList(
            _block(given + skip, width) for given, skip, width in zip(below, channels[-2::-1], WIDTHS, strict=True)
        )
        self.detail = _block(WIDTHS[-1] + image_channels * STRIDES[0] ** 2, WIDTHS[-1])
        self.head = nn.ConvTranspose2d(WIDTHS[-1], n_outputs, STRIDES[0], STRIDES[0])

    def forward(self, features: Sequence[Tensor], image: Tensor) -> Tensor:
        below = features[-1]
        for block, skip in zip(self.blocks, features[-2::-1], strict=True):
            larger = functional.interpolate(below, skip.shape[2:], mode="bilinear", align_corners=False)
            below = block(torch.cat((larger, skip), 1))
        below = self.detail(torch.cat((below, functional.pixel_unshuffle(image, STRIDES[0])), 1))
        return self.head(below)


def _block(given: int, width: int) -> nn.Sequential:
    """Group norm: a slice may be two voxels wide at the coarsest stride, too few for a norm per channel."""
    return nn.Sequential(
        nn.Conv2d(given, width, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, width), nn.LeakyReLU(inplace=True)
    )


def plane_architecture(architecture: Architecture) -> Architecture:
    """A 3D U-Net's stages and widths in 2D, without the first axis.

    Raises:
        ValueError: it is no 3D architecture.
    """
    if architecture.dims != 3:
        raise ValueError(f"the architecture has {architecture.dims} dimensions, not 3")
    kwargs = dict(architecture.arch_kwargs)
    for key in architecture.kw_requires_import:
        if isinstance(kwargs.get(key), str):
            kwargs[key] = kwargs[key].replace("3d", "2d")
    for key in ("kernel_sizes", "strides"):
        kwargs[key] = [list(entry)[1:] for entry in kwargs[key]]
    content = architecture.model_dump(by_alias=True)
    return Architecture.model_validate({**content, "arch_kwargs": kwargs})
