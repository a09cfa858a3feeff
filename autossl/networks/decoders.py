"""Further outputs on a U-Net's features: decoders that differ in their up-sampling, and a head for distances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn
from torch.nn import functional

from autossl.networks.build import build_network, seeded_weights
from autossl.planners.plans import Architecture

Upsampling = Literal["linear", "nearest"]


class DecoderVariant(nn.Module):
    """The plan's decoder with interpolation instead of transposed convolutions; stages, widths and heads are alike.

    Between two stages: in 3D interpolation, then a convolution with the kernel of the finer stage, norm and
    non-linearity; in 2D a 1×1 convolution, then interpolation. Linear interpolation aligns the corners.
    Source: Wu et al., Medical Image Analysis 81 (2022), MC-Net+; kernels and strides per axis are ours.

    Args:
        architecture: of the network whose encoder gives the skips.
        n_outputs: channels of logits.
        upsampling: how feature maps become larger.
        deep_supervision: heads at all levels, else at the full resolution alone.
        seed: of the weights; None draws from the global generator.
    """

    def __init__(
        self,
        architecture: Architecture,
        n_outputs: int,
        upsampling: Upsampling = "linear",
        deep_supervision: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        with seeded_weights(seed):
            plan: Any = build_network(architecture, 1, n_outputs)
            n_stages = len(plan.decoder.stages)
            self.ups = nn.ModuleList(_UpSampling(plan.encoder, stage, upsampling) for stage in range(n_stages))
            self.ups.apply(plan.initialize)
        self.stages = plan.decoder.stages
        self.deep_supervision = deep_supervision
        self.heads = plan.decoder.seg_layers if deep_supervision else plan.decoder.seg_layers[-1:]

    def forward(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """Logits, full resolution first, from the encoder's feature maps as `features.encode` gives them."""
        below, logits = skips[-1], []
        for index, (up, stage) in enumerate(zip(self.ups, self.stages, strict=True)):
            skip = skips[-(index + 2)]
            below = stage(torch.cat((up(below, skip.shape[2:]), skip), 1))
            if index == len(self.stages) - 1:
                logits.append(self.heads[-1](below))
            elif self.deep_supervision:
                logits.append(self.heads[index](below))
        return logits[::-1]


class _UpSampling(nn.Module):
    """To the next finer stage's size and width."""

    def __init__(self, encoder: Any, stage: int, upsampling: Upsampling) -> None:
        super().__init__()
        from_width, to_width = encoder.output_channels[-(stage + 1)], encoder.output_channels[-(stage + 2)]
        self.flat = len(encoder.strides[0]) == 2
        self.mode = "nearest" if upsampling == "nearest" else "bilinear" if self.flat else "trilinear"
        self.align_corners = None if upsampling == "nearest" else True
        self.convolution = (
            encoder.conv_op(from_width, to_width, 1)
            if self.flat
            else convolution_like(encoder, from_width, to_width, encoder.kernel_sizes[-(stage + 2)])
        )

    def forward(self, below: Tensor, size: Sequence[int]) -> Tensor:
        """[N,c,*S] → [N,c',*size]."""
        if self.flat:  # the cheaper order, which a 1×1 convolution allows
            below = self.convolution(below)
        larger = functional.interpolate(below, tuple(size), mode=self.mode, align_corners=self.align_corners)
        return larger if self.flat else self.convolution(larger)


class DistanceHead(nn.Module):
    """Signed distances in [-1, 1] per structure from `dec:last`: a 1×1 convolution and tanh. It is never deployed.

    Source: Luo et al., AAAI 2021 (dual-task consistency).

    Args:
        in_channels: of the feature map.
        n_classes: structures, without background.
        dims: 2 or 3.
        seed: of the weights; None draws from the global generator.
    """

    def __init__(self, in_channels: int, n_classes: int, dims: int, seed: int | None = None) -> None:
        super().__init__()
        with seeded_weights(seed):
            self.convolution = (nn.Conv2d if dims == 2 else nn.Conv3d)(in_channels, n_classes, 1)

    def forward(self, features: Tensor, classes: Sequence[int] | None = None) -> Tensor:
        """Float32 `[N,F,*S]` from `[N,in_channels,*S]`; of the named classes alone, in their order, where given."""
        weight, bias = self.convolution.weight, self.convolution.bias
        if classes is not None and bias is not None:
            weight, bias = weight[list(classes)], bias[list(classes)]
        convolve = functional.conv2d if features.ndim == 4 else functional.conv3d
        return torch.tanh(convolve(features, weight, bias).float())


def convolution_like(encoder: Any, from_width: int, to_width: int, kernel: Any) -> nn.Module:
    """Convolution, norm and non-linearity of the encoder's kind: [N, from_width, *S] → [N, to_width, *S]."""
    return ConvDropoutNormReLU(
        encoder.conv_op,
        from_width,
        to_width,
        kernel,
        1,
        encoder.conv_bias,
        encoder.norm_op,
        encoder.norm_op_kwargs,
        encoder.dropout_op,
        encoder.dropout_op_kwargs,
        encoder.nonlin,
        encoder.nonlin_kwargs,
    )
