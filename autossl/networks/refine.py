"""A head that corrects a U-Net's logits, and the network of both as it is deployed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from autossl.networks.build import build_network, seeded_weights
from autossl.networks.decoders import convolution_like
from autossl.networks.features import decode, encode
from autossl.planners.plans import Architecture


class RefineHead(nn.Module):
    """Refined logits from `dec:last` and the coarse logits: they are corrected by a few convolutions.

    Two convolutions with norm and non-linearity, as wide as the plan's first stage and with its kernel (so in plane
    where that is), then a 1×1 convolution that begins as zero: at the start the refined logits are the coarse ones. The
    probabilities that the head looks at have no gradient.

    Args:
        architecture: of the network that it refines.
        n_outputs: channels of logits.
        activation: what makes probabilities of the coarse logits.
        seed: of the weights; None draws from the global generator.
    """

    def __init__(
        self,
        architecture: Architecture,
        n_outputs: int,
        activation: Literal["softmax", "sigmoid"] = "softmax",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        with seeded_weights(seed):
            plan: Any = build_network(architecture, 1, n_outputs)
            encoder, width, kernel = plan.encoder, plan.encoder.output_channels[0], plan.encoder.kernel_sizes[0]
            self.blocks = nn.Sequential(
                convolution_like(encoder, width + n_outputs, width, kernel),
                convolution_like(encoder, width, width, kernel),
            )
            self.blocks.apply(plan.initialize)
            self.correction = plan.encoder.conv_op(width, n_outputs, 1)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def forward(self, features: Tensor, coarse: Tensor) -> Tensor:
        """[N,C,*S] from `dec:last` [N,c_0,*S] and coarse logits [N,C,*S]."""
        z = coarse.detach().float()
        p = torch.softmax(z, 1) if self.activation == "softmax" else torch.sigmoid(z)
        return coarse + self.correction(self.blocks(torch.cat((features, p.to(features)), 1)))


class RefinedNetwork(nn.Module):
    """A U-Net with its refine head; gives the refined logits at full resolution."""

    def __init__(self, network: nn.Module, head: RefineHead) -> None:
        super().__init__()
        self.network = network
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        """Logits [N,C,*S]."""
        logits, features = decode(self.network, encode(self.network, image))
        return self.head(features[-1], logits[0])
