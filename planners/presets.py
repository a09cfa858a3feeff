"""The presets: which network, how much memory it may take, and how long it trains. Numbers of nnU-Net v2, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from autossl.data.problems import InvalidInput, Problem, nearest
from autossl.planners.memory import NetworkShape, feature_map_elements
from autossl.planners.plans import NNUNET_LEARNING_RATE, NNUNET_MOMENTUM
from autossl.planners.topology import Topology

REFERENCE_BATCH = {2: 12, 3: 2}
"""Batch sizes that the reference costs stand for (nnU-Net v2), by spatial dimensions."""
MIN_BATCH = 2


@dataclass(frozen=True)
class MemoryBudget:
    """A cost in feature-map elements that is known to fit a graphics card."""

    elements: dict[int, float]
    """By spatial dimensions."""
    gpu_memory_gb: float
    covered_share: float
    """One batch sees at most this share of the voxels of the data set."""
    shrinks_for_two: bool
    """True: the patch shrinks only when a batch of two would not fit; False: when the reference batch would not."""


@dataclass(frozen=True)
class PatchBudget:
    """A patch and batch for processors without a graphics card."""

    patch_voxels: dict[int, int]
    """At most, by spatial dimensions."""
    batch_voxels_2d: int
    batch_range_2d: tuple[int, int]
    batch_3d: int
    min_in_plane_share: float
    """A patch covers at least this share of the median image in plane; else the target spacing is made coarser."""


@dataclass(frozen=True)
class Preset:
    """How networks are sized."""

    name: str
    title: str
    plans_name: str
    planner_name: str
    network: Literal["plain", "resenc"]
    budget: MemoryBudget | PatchBudget
    base_features: int = 32
    max_features: Mapping[int, int] = field(default_factory=lambda: {2: 512, 3: 320})
    """By spatial dimensions."""
    total_steps: int | None = None
    """None: by the number of labeled patients."""
    learning_rate: float = NNUNET_LEARNING_RATE
    momentum: float = NNUNET_MOMENTUM
    """Of SGD with Nesterov's momentum."""
    shares_data_of: str | None = None
    """Plans whose data folders of 2d and 3d_fullres are used, as nnU-Net's planners of residual networks do."""

    def features(self, n_stages: int, dims: int) -> tuple[int, ...]:
        """Channels per stage: doubled at each, up to the maximum."""
        limit = self.max_features[dims]
        return tuple(min(limit, self.base_features * 2**stage) for stage in range(n_stages))

    def encoder_blocks(self, n_stages: int) -> tuple[int, ...]:
        """Convolutions (plain) or residual blocks per stage."""
        if self.network == "plain":
            return (2,) * n_stages
        return (1, 3, 4, *(6,) * max(0, n_stages - 3))[:n_stages]

    def decoder_convolutions(self, n_stages: int) -> tuple[int, ...]:
        """Convolutions per decoder stage."""
        return (2 if self.network == "plain" else 1,) * (n_stages - 1)

    def cost(self, topology: Topology, n_outputs: int) -> int:
        """Feature-map elements of the network on one patch."""
        stages, dims = topology.n_stages, len(topology.patch_size)
        shape = NetworkShape(
            kind=self.network,
            features=self.features(stages, dims),
            strides=topology.strides,
            encoder_blocks=self.encoder_blocks(stages),
            decoder_convolutions=self.decoder_convolutions(stages),
            n_outputs=n_outputs,
        )
        return feature_map_elements(shape, topology.patch_size)

    def data_identifier(self, configuration: str) -> str:
        """nnU-Net's name of the data folder; only for exports, our folders are named by `Plans.data_hash`."""
        shared = self.shares_data_of if configuration in ("2d", "3d_fullres") else None
        return f"{shared or self.plans_name}_{configuration}"


def _resenc(size: str, elements: dict[int, float], gpu_memory_gb: float) -> Preset:
    return Preset(
        name=f"resenc_{size.lower()}",
        title=f"nnU-Net's residual encoder U-Net {size}, {gpu_memory_gb:g} GB",
        plans_name=f"nnUNetResEncUNet{size}Plans",
        planner_name=f"nnUNetPlannerResEnc{size}",
        network="resenc",
        budget=MemoryBudget(elements, gpu_memory_gb, covered_share=1, shrinks_for_two=False),
        shares_data_of="nnUNetPlans",
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="plain",
            title="nnU-Net's default U-Net, 8 GB",
            plans_name="nnUNetPlans",
            planner_name="ExperimentPlanner",
            network="plain",
            budget=MemoryBudget({2: 85e6, 3: 560e6}, 8, covered_share=0.05, shrinks_for_two=True),
        ),
        _resenc("M", {2: 135e6, 3: 680e6}, 8),
        _resenc("L", {2: 380e6, 3: 2.1e9}, 24),
        _resenc("XL", {2: 560e6, 3: 3.6e9}, 40),
        Preset(
            name="nano",
            title="a small U-Net for processors and first looks",
            plans_name="autosslNanoPlans",
            planner_name="autosslNanoPlanner",
            network="plain",
            budget=PatchBudget({2: 128**2, 3: 48**3}, 60_000, (MIN_BATCH, 24), 2, min_in_plane_share=0.25),
            base_features=8,
            max_features={2: 128, 3: 128},
            total_steps=1500,
            learning_rate=0.1,
            momentum=0.9,
        ),
    )
}


def preset_named(name: str) -> Preset:
    """The preset of this name; raises `InvalidInput` with the nearest ones."""
    if name not in PRESETS:
        raise InvalidInput(
            Problem(f"preset '{name}' is unknown", f"one of {nearest(name, PRESETS)}", "choose one of these")
        )
    return PRESETS[name]
