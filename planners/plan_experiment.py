"""From a data set's fingerprint to its plans: nnU-Net v2's rules, our semi-supervised ones, and a reason for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from autossl.data.problems import InvalidInput, Problem, nearest
from autossl.planners import semi_supervised
from autossl.planners.configurations import (
    Sizes,
    SizingRequest,
    build_architecture,
    coarsen_until_covered,
    find_lowres,
    size_configuration,
)
from autossl.planners.facts import DatasetFacts, dataset_facts, numbers
from autossl.planners.plans import NNUNET_LEARNING_RATE, NNUNET_MOMENTUM, ConfigurationPlan, Plans
from autossl.planners.presets import MemoryBudget, PatchBudget, Preset, preset_named
from autossl.planners.spacing import (
    FloatArray,
    axis_order,
    check_overwritten_spacing,
    median_resampled_shape,
    target_spacing,
)

if TYPE_CHECKING:
    from autossl.data.raw_dataset import DatasetDescription
    from autossl.planners.fingerprint import Fingerprint

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
MASK_BELOW_RELATIVE_SIZE = 0.75
"""Where the crop to non-zero leaves less than this, z-scores are taken inside the non-zero mask (nnU-Net v2)."""
SCHEME_OF_CHANNEL = {
    "ct": "CTNormalization",
    "nonorm": "NoNormalization",
    "zscore": "ZScoreNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}
READER_OF_ENDING = {
    ".nii.gz": "NibabelIOWithReorient",
    ".nii": "NibabelIOWithReorient",
    ".png": "NaturalImage2DIO",
    ".bmp": "NaturalImage2DIO",
    ".tif": "NaturalImage2DIO",
}
READER_OTHERWISE = "SimpleITKIO"


@dataclass(frozen=True)
class PlanOptions:
    """What a user may ask of the planner."""

    preset: str = "plain"
    gpu_memory_gb: float | None = None
    """Default: what the preset was made for."""
    overwrite_target_spacing: tuple[float, ...] | None = None
    """z y x in mm, in the images' own axis order."""
    configurations: tuple[str, ...] | None = None
    """Asked for; each must be one that the rules give. All that they give are planned, whatever is asked."""


def plan_experiment(
    fingerprint: Fingerprint,
    description: DatasetDescription,
    dataset_name: str,
    preset: str = "plain",
    gpu_memory_gb: float | None = None,
    overwrite_target_spacing: Sequence[float] | None = None,
    configurations: Sequence[str] | None = None,
) -> Plans:
    """Plans of a data set for one preset; see `PlanOptions` for the arguments after the first three.

    Args:
        fingerprint: What one read of each case told.
        description: dataset.json.
        dataset_name: DatasetXXX_Name.

    Raises:
        InvalidInput: an unknown preset, a configuration that the rules do not give, or values that make no sense.
    """
    options = PlanOptions(
        preset=preset,
        gpu_memory_gb=gpu_memory_gb,
        overwrite_target_spacing=None if overwrite_target_spacing is None else tuple(overwrite_target_spacing),
        configurations=None if configurations is None else tuple(configurations),
    )
    return plan_from_facts(dataset_facts(fingerprint, description, dataset_name), options)


def check_options(options: PlanOptions) -> None:
    """Raises `InvalidInput` where options cannot be met by any data set; cheap, for before a scan."""
    _gpu_memory_gb(preset_named(options.preset), options.gpu_memory_gb)
    if options.overwrite_target_spacing is not None:
        check_overwritten_spacing(options.overwrite_target_spacing)
    problems = [_unknown(name) for name in options.configurations or () if name not in CONFIGURATIONS]
    if problems:
        raise InvalidInput(problems)


def plan_from_facts(facts: DatasetFacts, options: PlanOptions) -> Plans:
    """The same from the numbers alone."""
    preset = preset_named(options.preset)
    space = _decide_space(facts, preset, options)
    sizes, absent = _all_sizes(space, preset)
    _check_asked(options.configurations, sizes, absent, facts.dataset_name)
    decided = semi_supervised.decide(facts, preset, sizes)
    why = space.why | {f"configurations.{name}": text for name, text in absent.items()}
    configurations = {}
    for name in sizes:
        configurations[name], reasons = _configuration_plan(facts, preset, space, name, sizes)
        why |= {f"configurations.{name}.{key}": text for key, text in reasons.items()}
    forward = space.forward
    return Plans(
        dataset_name=facts.dataset_name,
        plans_name=preset.plans_name,
        preset=preset.name,
        orientation=facts.orientation,
        image_reader_writer=_reader(facts.file_ending),
        original_median_spacing_after_transp=_in_order(np.median(facts.spacings, 0), forward),
        original_median_shape_after_transp=_whole_in_order(np.median(facts.shapes, 0), forward),
        transpose_forward=forward,
        transpose_backward=space.backward,
        configurations=configurations,
        experiment_planner_used=preset.planner_name,
        foreground_intensity_properties_per_channel=dict(facts.intensities),
        semi_supervised=decided.plan,
        why=why | decided.why,
    )


@dataclass(frozen=True)
class _Space:
    """Axis order and full resolution."""

    forward: tuple[int, int, int]
    backward: tuple[int, int, int]
    request: SizingRequest
    """For all three axes, in transposed order."""
    spacing_why: str
    may_coarsen: bool
    why: dict[str, str]


def _decide_space(facts: DatasetFacts, preset: Preset, options: PlanOptions) -> _Space:
    target, spacing_why = _target(facts, options.overwrite_target_spacing)
    forward, backward = axis_order(target)
    median = median_resampled_shape(facts.shapes, facts.spacings, target)[list(forward)]
    request = SizingRequest(
        preset=preset,
        gpu_memory_gb=_gpu_memory_gb(preset, options.gpu_memory_gb),
        n_outputs=facts.n_priced_outputs,
        n_cases=facts.n_cases,
        spacing=np.asarray(target, dtype=np.float64)[list(forward)],
        median_shape=median,
        exact_shape=median,
    )
    order = f"axis {forward[0]} is the coarsest ({target[forward[0]]:g} of {numbers(target)} mm) and comes first"
    why = {
        "orientation": (
            "volumes are turned to RAS+, so that an axis means the same in every case"
            if facts.orientation == "RAS"
            else f"{facts.file_ending} pictures have no directions in space"
        ),
        "image_reader_writer": _reader_why(facts),
        "transpose_forward": order,
        "transpose_backward": f"undoes {' '.join(str(axis) for axis in forward)}",
        "original_median_spacing_after_transp": f"of {facts.n_labeled} labeled cases, as stored; for information",
        "original_median_shape_after_transp": f"of {facts.n_labeled} labeled cases after the crop; for information",
    }
    return _Space(forward, backward, request, spacing_why, options.overwrite_target_spacing is None, why)


def _target(facts: DatasetFacts, overwritten: tuple[float, ...] | None) -> tuple[tuple[float, float, float], str]:
    if overwritten is None:
        decided = target_spacing(facts.spacings, facts.shapes)
        in_plane = f"median of {facts.n_labeled} labeled images = {numbers(decided.spacing_zyx_mm[1:])} in plane"
        return decided.spacing_zyx_mm, in_plane if facts.is_2d else decided.why
    z, y, x = check_overwritten_spacing(overwritten)
    if facts.is_2d:
        z = float(np.percentile(facts.spacings[:, 0], 50))
        return (z, y, x), f"--overwrite_target_spacing {numbers((y, x))} mm in plane; there is no second slice"
    return (z, y, x), f"--overwrite_target_spacing {numbers((z, y, x))} mm"


def _gpu_memory_gb(preset: Preset, asked: float | None) -> float:
    if not isinstance(preset.budget, MemoryBudget):
        if asked is not None:
            raise InvalidInput(
                Problem(
                    f"--gpu_memory_gb {asked:g} with preset {preset.name}, which is sized for processors",
                    "no memory with this preset",
                    "leave --gpu_memory_gb out, or choose another preset",
                )
            )
        return math.inf
    if asked is not None and not (math.isfinite(asked) and asked > 0):
        raise InvalidInput(
            Problem(f"--gpu_memory_gb {asked}", "a positive number of gigabytes", "correct --gpu_memory_gb")
        )
    return preset.budget.gpu_memory_gb if asked is None else asked


def _all_sizes(space: _Space, preset: Preset) -> tuple[dict[str, Sizes], dict[str, str]]:
    """Sizes per configuration, and the reasons for those that are left out or were searched for."""
    volume, notes = space.request, {}
    plane = replace(
        volume,
        spacing=volume.spacing[1:],
        median_shape=volume.median_shape[1:],
        exact_shape=volume.exact_shape[1:],
        slices=float(volume.median_shape[0]),
    )
    sizes = {"2d": _full_size(plane, space, preset)}
    if volume.median_shape[0] == 1:
        notes["3d_fullres"] = notes["3d_lowres"] = "not planned: the median image has one slice"
        return sizes, notes
    full = sizes["3d_fullres"] = _full_size(volume, space, preset)
    if isinstance(preset.budget, PatchBudget):
        notes["3d_lowres"] = f"not planned: in {preset.name}, a coarser target spacing of 3d_fullres takes its place"
        return sizes, notes
    low, notes["3d_lowres"] = find_lowres(full)
    if low is not None:
        why = low.why | {"spacing": notes["3d_lowres"].removeprefix("planned: ")}
        sizes["3d_lowres"] = replace(low, why=why)
    return sizes, notes


def _full_size(request: SizingRequest, space: _Space, preset: Preset) -> Sizes:
    sizes, spacing_why = size_configuration(request), space.spacing_why
    if isinstance(preset.budget, PatchBudget) and space.may_coarsen:
        sizes, coarser_why = coarsen_until_covered(sizes, preset.budget.min_in_plane_share)
        spacing_why = f"{spacing_why}; {coarser_why}" if coarser_why else spacing_why
    if request.dims == 2:
        spacing_why = f"{spacing_why}; the slice axis is never resampled"
    return replace(sizes, why=sizes.why | {"spacing": spacing_why})


def _check_asked(
    asked: tuple[str, ...] | None, sizes: Mapping[str, Sizes], notes: Mapping[str, str], dataset_name: str
) -> None:
    problems = []
    for name in asked or ():
        if name not in CONFIGURATIONS:
            problems.append(_unknown(name))
        elif name not in sizes:
            problems.append(
                Problem(
                    f"{name} of {dataset_name} is {notes[name]}",
                    f"one of {', '.join(sizes)}",
                    f"leave {name} out of -c",
                )
            )
    if problems:
        raise InvalidInput(problems)


def _unknown(name: str) -> Problem:
    return Problem(
        f"configuration '{name}' is unknown",
        f"one of {nearest(name, CONFIGURATIONS)}",
        "correct -c" + ("; the cascade does not exist yet" if "cascade" in name else ""),
    )


def _configuration_plan(
    facts: DatasetFacts, preset: Preset, space: _Space, name: str, sizes: Mapping[str, Sizes]
) -> tuple[ConfigurationPlan, dict[str, str]]:
    size = sizes[name]
    request, batch = size.request, size.batch_size
    schemes, masks, why = _normalization(facts)
    batch_dice, dice_why = _batch_dice(name, "3d_lowres" in sizes)
    pairs = semi_supervised.left_right_pairs(facts.schema.foreground)
    axes, axes_why = semi_supervised.mirror_axes(request.dims, space.forward, pairs)
    plan = ConfigurationPlan(
        data_identifier=preset.data_identifier(name),
        batch_size=batch,
        patch_size=size.topology.patch_size,
        median_image_size_in_voxels=tuple(float(edge) for edge in request.median_shape),
        spacing=tuple(float(step) for step in request.spacing),
        normalization_schemes=schemes,
        use_mask_for_norm=masks,
        architecture=build_architecture(preset, size.topology),
        batch_dice=batch_dice,
        mirror_axes=axes,
        labeled_batch_size=batch,
        unlabeled_batch_size=batch,
        learning_rate=preset.learning_rate,
        momentum=preset.momentum,
    )
    why |= size.why | semi_supervised.batch_reasons(batch, facts.n_unlabeled)
    why |= {"batch_dice": dice_why, "mirror_axes": axes_why} | _optimizer_reasons(preset)
    why["median_image_size_in_voxels"] = f"median of {facts.n_labeled} labeled cases after the crop, at this spacing"
    why["architecture.network_class_name"] = f"preset {preset.name}: {preset.title}"
    why["resampling_fn_data"] = (
        "image order 3, label map order 1; nearest through-plane where spacing differs over 3-fold"
    )
    return plan, why


def _optimizer_reasons(preset: Preset) -> dict[str, str]:
    if (preset.learning_rate, preset.momentum) == (NNUNET_LEARNING_RATE, NNUNET_MOMENTUM):
        return {"learning_rate": "nnU-Net's", "momentum": "nnU-Net's"}
    return {
        "learning_rate": f"with momentum {preset.momentum} a lasting gradient moves weights as far as with nnU-Net's "
        "rate of 0.01 and momentum of 0.99",
        "momentum": "0.99 averages 100 steps, and in a short run a small network may then predict one class alone to "
        "the end",
    }


def _normalization(facts: DatasetFacts) -> tuple[tuple[str, ...], tuple[bool, ...], dict[str, str]]:
    schemes = tuple(SCHEME_OF_CHANNEL.get(n.casefold(), "ZScoreNormalization") for n in facts.channel_names)
    relative = facts.median_relative_size_after_crop
    is_small = relative < MASK_BELOW_RELATIVE_SIZE
    masks = tuple(is_small and scheme == "ZScoreNormalization" for scheme in schemes)
    named = ", ".join(f"{name} → {scheme}" for name, scheme in zip(facts.channel_names, schemes, strict=True))
    return (
        schemes,
        masks,
        {
            "normalization_schemes": f"by channel name: {named}",
            "use_mask_for_norm": (
                f"the crop to non-zero leaves {relative:.1%} of the median image, "
                f"{'below' if is_small else 'at least'} {MASK_BELOW_RELATIVE_SIZE:.0%}: z-scores are taken "
                f"{'inside the non-zero mask' if is_small else 'over the whole image'}"
            ),
        },
    )


def _batch_dice(name: str, has_lowres: bool) -> tuple[bool, str]:
    if name == "2d":
        return True, "2d: one slice holds too few classes, the batch is taken as one image"
    if name == "3d_lowres":
        return False, "3d_lowres: its patch sees enough of an image"
    seen = "a 3d_lowres is planned: patches see little of an image" if has_lowres else "patches see enough of an image"
    return has_lowres, f"3d_fullres: {seen}"


def _reader(file_ending: str) -> str:
    return READER_OF_ENDING.get(file_ending.lower(), READER_OTHERWISE)


def _reader_why(facts: DatasetFacts) -> str:
    reader = _reader(facts.file_ending)
    exact = "gives the same arrays"
    if reader == READER_OTHERWISE and facts.orientation == "RAS":
        exact = "gives the same arrays only where files are stored in RAS+ order"
    return f"nnU-Net v2's reader of {facts.file_ending} that {exact}; for exports"


def _in_order(values: FloatArray, forward: tuple[int, int, int]) -> tuple[float, float, float]:
    z, y, x = (float(values[axis]) for axis in forward)
    return z, y, x


def _whole_in_order(values: FloatArray, forward: tuple[int, int, int]) -> tuple[int, int, int]:
    z, y, x = (round(value) for value in _in_order(values, forward))
    return z, y, x
