"""The sizes of one configuration: patch, network, batch; and the searches for a low-resolution or a coarser one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from autossl.data.problems import InvalidInput, Problem
from autossl.planners.facts import numbers
from autossl.planners.plans import NETWORK_CLASSES, Architecture
from autossl.planners.presets import MIN_BATCH, REFERENCE_BATCH, PatchBudget, Preset
from autossl.planners.spacing import COARSENING_STEP, FloatArray, coarser
from autossl.planners.topology import MIN_EDGE, START_VOXELS, Topology, shrink_to_fit, start_patch

LOWRES_BELOW_SHARE = 0.25
"""A patch that sees less of the median image than this asks for a low-resolution configuration (nnU-Net v2)."""
LOWRES_MIN_REDUCTION = 2
"""The median image loses at least this factor of its voxels, or the low resolution is not worth it (nnU-Net v2)."""


@dataclass(frozen=True)
class SizingRequest:
    """What sizes are made from. Arrays are in transposed order, the slice axis left out for 2d."""

    preset: Preset
    gpu_memory_gb: float
    n_outputs: int
    n_cases: int
    """Labeled and unlabeled."""
    spacing: FloatArray
    median_shape: FloatArray
    """Voxels per axis at this spacing."""
    exact_shape: FloatArray
    """The same before it was rounded, where a coarser spacing made it."""
    slices: float = 1.0
    """2d: slices of the median image, left out of the arrays above."""

    @property
    def dims(self) -> int:
        """Spatial dimensions, 2 or 3."""
        return len(self.spacing)

    @property
    def dataset_voxels(self) -> float:
        """Of all labeled and unlabeled cases, estimated from the median image; caps the batch."""
        return float(np.prod(self.exact_shape) * self.slices * self.n_cases)

    def at(self, spacing: FloatArray) -> SizingRequest:
        """The same at a coarser spacing."""
        exact = self.spacing / spacing * self.exact_shape
        rounded = np.asarray([round(float(edge)) for edge in exact], dtype=np.float64)
        return replace(self, spacing=spacing, median_shape=rounded, exact_shape=exact)


@dataclass(frozen=True)
class Sizes:
    """The decided sizes of a configuration, and the reasons by field name."""

    request: SizingRequest
    topology: Topology
    batch_size: int
    why: dict[str, str]

    @property
    def share_of_median(self) -> float:
        """Voxels of the patch / voxels of the median image; may exceed 1."""
        return self.topology.voxels / float(np.prod(self.request.median_shape))

    @property
    def share_in_plane(self) -> float:
        """The same for the last two axes."""
        return math.prod(self.topology.patch_size[-2:]) / float(np.prod(self.request.median_shape[-2:]))


def size_configuration(request: SizingRequest) -> Sizes:
    """Patch, network and batch within the preset's budget; raises `InvalidInput` where images are too small to pool."""
    spacing, median = [float(v) for v in request.spacing], [float(v) for v in request.median_shape]
    limit = _limit(request)
    topology, reductions = shrink_to_fit(spacing, median, limit.too_large)
    if topology.n_stages < 2:
        raise InvalidInput(
            Problem(
                f"the median image is {numbers(median)} voxels at {numbers(spacing)} mm: too small to pool even once",
                f"at least {3 * MIN_EDGE} voxels along one axis, or {2 * MIN_EDGE} along two of like spacing",
                "give a finer spacing with --overwrite_target_spacing z y x, or use larger images",
            )
        )
    batch_size, batch_why = _batch(request, topology)
    preset, stages = request.preset, topology.n_stages
    pooled = [divisor.bit_length() - 1 for divisor in topology.divisors]
    bottleneck = [edge // divisor for edge, divisor in zip(topology.patch_size, topology.divisors, strict=True)]
    why = {
        "patch_size": (
            f"{START_VOXELS[request.dims]:,} voxels in proportion to 1/spacing, cut to the median image of "
            f"{numbers(median)}: {numbers(start_patch(spacing, median))}; after {reductions} reductions of the "
            f"axis that covers most of it, {limit.text(topology)}; padded to multiples of {numbers(topology.divisors)}"
        ),
        "architecture.arch_kwargs.strides": (
            f"{' / '.join(str(n) for n in pooled)} poolings per axis: an axis is halved while it has at least "
            f"{2 * MIN_EDGE} voxels ({3 * MIN_EDGE} when alone) and is less than twice as coarse as the finest one "
            f"that can be; bottleneck {numbers(bottleneck)}"
        ),
        "architecture.arch_kwargs.kernel_sizes": (
            f"3 along an axis once its spacing is less than twice the finest one, 1 before; from {numbers(spacing)} mm"
        ),
        "architecture.arch_kwargs.features_per_stage": (
            f"{preset.base_features} doubled at each of {stages} stages, at most {preset.max_features[request.dims]}"
        ),
        "batch_size": batch_why,
    }
    return Sizes(request, topology, batch_size, why)


def find_lowres(full: Sizes) -> tuple[Sizes | None, str]:
    """The configuration at the finest coarser spacing whose patch sees enough of the image, where one is needed.

    Returns:
        None where none is planned, and the reason with its figures.
    """
    if full.share_of_median >= LOWRES_BELOW_SHARE:
        return None, (
            f"not planned: a patch of 3d_fullres covers {full.share_of_median:.1%} of the median image's voxels, "
            f"at least {LOWRES_BELOW_SHARE:.0%}"
        )
    request, spacing = full.request, full.request.spacing
    full_voxels = exact_voxels = float(np.prod(request.exact_shape))
    low, patch_voxels, steps = full, full.topology.voxels, 0
    while patch_voxels / exact_voxels < LOWRES_BELOW_SHARE:
        spacing = coarser(spacing)
        low = size_configuration(request.at(spacing))
        exact_voxels = float(np.prod(low.request.exact_shape))
        patch_voxels, steps = low.topology.voxels, steps + 1
    reduction = full_voxels / exact_voxels
    figures = (
        f"a patch of 3d_fullres covers {full.share_of_median:.1%} of the median image's voxels, below "
        f"{LOWRES_BELOW_SHARE:.0%}; {steps} steps of {COARSENING_STEP} to {numbers(spacing)} mm, where it covers "
        f"{patch_voxels / exact_voxels:.1%}; {reduction:.2f} times fewer voxels"
    )
    if reduction < LOWRES_MIN_REDUCTION:
        return None, f"not planned: {figures}, fewer than {LOWRES_MIN_REDUCTION} times"
    return low, f"planned: {figures}"


def coarsen_until_covered(fine: Sizes, min_share: float) -> tuple[Sizes, str | None]:
    """Coarser spacing, step by step, until a patch covers this share of the median image in plane.

    Returns:
        The same sizes and None where it covers it already; else the new ones and the reason.
    """
    sizes, spacing, steps = fine, fine.request.spacing, 0
    while sizes.share_in_plane < min_share:
        spacing = coarser(spacing)
        sizes, steps = size_configuration(fine.request.at(spacing)), steps + 1
    if not steps:
        return fine, None
    return sizes, (
        f"{steps} steps of {COARSENING_STEP} coarser than {numbers(fine.request.spacing)} mm: there, a patch of "
        f"{numbers(fine.topology.patch_size)} would cover {fine.share_in_plane:.1%} of the median image in plane; "
        f"now {numbers(sizes.topology.patch_size)} covers {sizes.share_in_plane:.1%}, at least {min_share:.0%}"
    )


def build_architecture(preset: Preset, topology: Topology) -> Architecture:
    """The network as nnU-Net v2 writes it."""
    dims, stages = len(topology.patch_size), topology.n_stages
    blocks = "n_conv_per_stage" if preset.network == "plain" else "n_blocks_per_stage"
    return Architecture(
        network_class_name=NETWORK_CLASSES[preset.network],
        arch_kwargs={
            "n_stages": stages,
            "features_per_stage": list(preset.features(stages, dims)),
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [list(kernel) for kernel in topology.kernel_sizes],
            "strides": [list(stride) for stride in topology.strides],
            blocks: list(preset.encoder_blocks(stages)),
            "n_conv_per_stage_decoder": list(preset.decoder_convolutions(stages)),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
    )


@dataclass(frozen=True)
class _Limit:
    too_large: Callable[[Topology], bool]
    text: Callable[[Topology], str]


def _limit(request: SizingRequest) -> _Limit:
    preset, budget, dims = request.preset, request.preset.budget, request.dims
    if isinstance(budget, PatchBudget):
        cap = budget.patch_voxels[dims]
        return _Limit(lambda topology: topology.voxels > cap, lambda topology: f"{topology.voxels:,} ≤ {cap:,} voxels")
    reference = _reference(request)
    # The reference stands for a batch of 12 in 2d, 2 in 3d; the plain preset shrinks only when 2 would not fit.
    batch = REFERENCE_BATCH[dims] if budget.shrinks_for_two else MIN_BATCH

    def price(topology: Topology) -> float:
        return preset.cost(topology, request.n_outputs) / batch * MIN_BATCH

    return _Limit(
        lambda topology: price(topology) > reference,
        lambda topology: (
            f"{preset.cost(topology, request.n_outputs):,} feature-map elements / {batch} × {MIN_BATCH} ≤ "
            f"{reference:,.0f}, what {request.gpu_memory_gb:g} GB stand for"
        ),
    )


def _reference(request: SizingRequest) -> float:
    budget = request.preset.budget
    if isinstance(budget, PatchBudget):
        raise TypeError(f"preset {request.preset.name} has no memory budget")
    return budget.elements[request.dims] * (request.gpu_memory_gb / budget.gpu_memory_gb)


def _batch(request: SizingRequest, topology: Topology) -> tuple[int, str]:
    budget = request.preset.budget
    if isinstance(budget, PatchBudget):
        if request.dims == 3:
            return budget.batch_3d, f"{budget.batch_3d} for every 3d configuration of {request.preset.name}"
        low, high = budget.batch_range_2d
        fitting = budget.batch_voxels_2d // topology.voxels
        return min(max(fitting, low), high), (
            f"{budget.batch_voxels_2d:,} voxels / {topology.voxels:,} voxels of a patch = {fitting}, "
            f"kept within {low} to {high}"
        )
    reference, cost = _reference(request), request.preset.cost(topology, request.n_outputs)
    fitting = round(reference / cost * REFERENCE_BATCH[request.dims])
    capped = round(request.dataset_voxels * budget.covered_share / topology.voxels)
    return max(min(fitting, capped), MIN_BATCH), (
        f"{reference:,.0f} / {cost:,} feature-map elements × {REFERENCE_BATCH[request.dims]} = {fitting} patches fit "
        f"{request.gpu_memory_gb:g} GB; at most {budget.covered_share:.0%} of the voxels of {request.n_cases} cases, "
        f"labeled and unlabeled = {capped}; at least {MIN_BATCH}"
    )
