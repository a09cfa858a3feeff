"""What predicts, as data: which trained networks, how their outputs become probabilities, how they are combined.

A training method writes a `PredictionSpec` into its checkpoints and prediction needs nothing else of the method.
The vocabulary is closed: a checkpoint can ask for what is listed here and for nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from autossl.data.problems import InvalidInput, Problem, schema_faults
from autossl.networks.build import build_network
from autossl.networks.decoders import DecoderVariant, Upsampling
from autossl.networks.features import decode, encode
from autossl.networks.refine import RefinedNetwork, RefineHead
from autossl.planners.plans import Architecture

Activation = Literal["softmax", "sigmoid", "dirichlet"]
SMALLEST_PROBABILITY = 1e-7
"""Keeps the logarithm of a mean probability finite; far below what a label decision can notice."""
LARGEST_LOGIT = 80.0
"""As evidence; exp of it, and sums of that, are still finite in float32."""
HEADS: tuple[str, ...] = ("refine",)
"""Named output heads a member may ask for; a method that deploys one adds its module to `autossl.networks`.

refine: `RefineHead`, which corrects the network's logits.
"""


class SharedDecoder(BaseModel):
    """A further decoder on a member's encoder; `name` is its entry in the checkpoint's `networks`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    upsampling: Upsampling
    deep_supervision: bool = False
    """Whether it was trained with heads at all levels; only the full resolution predicts."""


class Member(BaseModel):
    """One network of a prediction; `name` is its entry in the checkpoint's `networks`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    architecture: Architecture
    channels: tuple[int, ...] | None = None
    """Image channels that this network sees, in this order; None: all."""
    head: str | None = None
    """A named output head; None: the network's own logits. Its weights are the entry `NAME_HEAD`."""
    decoders: tuple[SharedDecoder, ...] = ()
    """Decoders beside the network's own; the mean of the probabilities of all of them is the member's."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Entries of the checkpoint's `networks` that the member is made of, its own first."""
        heads = () if self.head is None else (f"{self.name}_{self.head}",)
        return (self.name, *(decoder.name for decoder in self.decoders), *heads)

    @field_validator("channels")
    @classmethod
    def _distinct(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or len(set(value)) != len(value) or min(value) < 0):
            raise ValueError(f"channels {value} must be distinct numbers from 0, at least one")
        return value

    @field_validator("head")
    @classmethod
    def _known_head(cls, value: str | None) -> str | None:
        if value is not None and value not in HEADS:
            raise ValueError(f"head {value!r} is unknown; known: {', '.join(HEADS)}")
        return value


class PredictionSpec(BaseModel):
    """Members, activation and combination.

    `single`: one member; its logits are averaged over mirrored views. `mean_probabilities`: the probabilities of all
    members and mirrored views are averaged, and the logarithm of the mean (sigmoid: its logit) stands for the logits
    from there on. Both are blended over tiles and averaged over folds as logits, which is nnU-Net's order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    members: tuple[Member, ...] = Field(min_length=1)
    activation: Activation = "softmax"
    """softmax over labels; sigmoid per region; dirichlet: p = α / Σα, see `dirichlet_alpha`."""
    combine: Literal["single", "mean_probabilities"] = "single"

    @model_validator(mode="after")
    def _fits_together(self) -> PredictionSpec:
        names = [name for member in self.members for name in member.parts]
        if len(set(names)) != len(names):
            raise ValueError(f"members must have distinct names, found {names}")
        if self.combine == "single" and len(self.members) != 1:
            raise ValueError(f"'single' takes one member, found {len(self.members)}; use 'mean_probabilities'")
        several = any(member.decoders for member in self.members)
        if several and (self.combine == "single" or self.activation == "dirichlet"):
            raise ValueError("members with several decoders take 'mean_probabilities' of softmax or sigmoid")
        if any(member.head and (member.decoders or self.activation == "dirichlet") for member in self.members):
            raise ValueError("members with a head have no further decoders, and take softmax or sigmoid")
        if len({member.architecture.dims for member in self.members}) != 1:
            raise ValueError("members must agree on 2D or 3D: they see the same tiles")
        return self

    @property
    def output_activation(self) -> Activation:
        """What turns the combined logits into probabilities."""
        return "softmax" if self.combine == "mean_probabilities" and self.activation == "dirichlet" else self.activation

    @property
    def channels(self) -> frozenset[int] | None:
        """Image channels that at least one member looks at; None: all."""
        seen: set[int] = set()
        for member in self.members:
            if member.channels is None:
                return None
            seen |= set(member.channels)
        return frozenset(seen)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_json(cls, content: Any) -> PredictionSpec:
        """Reads `to_json`'s values; raises `InvalidInput` that names each field that is wrong."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            expected, fix = "a prediction as autossl_train writes it", "use a checkpoint of this version of autossl"
            faults = schema_faults(error, "the whole")
            raise InvalidInput([Problem(f"prediction, {fault}", expected, fix) for fault in faults]) from error


class DecoderEnsemble(nn.Module):
    """A U-Net with further decoders on its encoder, which runs once; gives `logits_of` their mean probabilities."""

    def __init__(self, network: nn.Module, decoders: Sequence[DecoderVariant], activation: Activation) -> None:
        super().__init__()
        self.network = network
        self.decoders = nn.ModuleList(decoders)
        self.activation = activation

    def forward(self, image: Tensor) -> Tensor:
        """Logits [N,K,*S] at full resolution."""
        skips = encode(self.network, image)
        total = probabilities_of(decode(self.network, skips)[0][0], self.activation)
        for decoder in self.decoders:
            total = total + probabilities_of(decoder(skips)[0], self.activation)
        return logits_of(total / (1 + len(self.decoders)), self.activation)


def build_member(member: Member, n_channels: int, n_outputs: int, activation: Activation = "softmax") -> nn.Module:
    """The member's network without weights of its own yet, in evaluation mode, giving full-resolution logits alone.

    The activation counts where several decoders are averaged; `member_parts` tells which weights go where.
    Raises `InvalidInput` where the member asks for a channel that the images do not have.
    """
    if member.channels is not None and max(member.channels) >= n_channels:
        raise InvalidInput(
            Problem(
                f"network '{member.name}' looks at channel {max(member.channels)}",
                f"channels below {n_channels}, the number of image channels",
                "use a checkpoint that belongs to these plans",
            )
        )
    seen = n_channels if member.channels is None else len(member.channels)
    network = build_network(member.architecture, seen, n_outputs, deep_supervision=False, seed=0)
    if member.decoders:
        variants = []
        for decoder in member.decoders:
            variant = DecoderVariant(
                member.architecture, n_outputs, decoder.upsampling, decoder.deep_supervision, seed=0
            )
            variant.deep_supervision = False
            variants.append(variant)
        network = DecoderEnsemble(network, variants, activation)
    elif member.head == "refine" and activation != "dirichlet":
        network = RefinedNetwork(network, RefineHead(member.architecture, n_outputs, activation, seed=0))
    return network.eval().requires_grad_(False)


def member_parts(member: Member, network: nn.Module) -> dict[str, nn.Module]:
    """The modules of `build_member`'s network by their entry in the checkpoint's `networks`."""
    modules = [network]
    if isinstance(network, DecoderEnsemble):
        modules = [network.network, *network.decoders]
    elif isinstance(network, RefinedNetwork):
        modules = [network.network, network.head]
    return dict(zip(member.parts, modules, strict=True))


def probabilities_of(logits: Tensor, activation: Activation, dim: int = 1) -> Tensor:
    """Probabilities in the logits' shape, computed in float32; `dim` is the axis of the outputs."""
    logits = logits.float()
    if activation == "softmax":
        return logits.softmax(dim)
    if activation == "sigmoid":
        return logits.sigmoid()
    alpha = dirichlet_alpha(logits)
    return alpha / alpha.sum(dim, keepdim=True)


def dirichlet_alpha(logits: Tensor) -> Tensor:
    """α = e + 1 with the evidence e = exp(logits), bounded so that float32 holds sums of it.

    Not softplus: there a voxel with much evidence for a wrong class hardly moves, because the gradient of α / Σα falls
    with α. Hippocampus, 2D, nano, 8 labels, 400 steps, both networks' supervised part alone: Dice 0.30 with softplus.
    """
    return logits.float().clamp(max=LARGEST_LOGIT).exp() + 1


def logits_of(probabilities: Tensor, activation: Activation) -> Tensor:
    """Values whose `output_activation` gives the probabilities back: the logarithm, or the logit for sigmoid."""
    bounded = probabilities.clamp(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return torch.logit(bounded) if activation == "sigmoid" else bounded.log()
