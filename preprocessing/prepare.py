"""One case from its image to the network's input, in nnU-Net v2's order: transpose, crop, normalize, resample.

The image and its nonzero mask never depend on the label, so that a hidden label cannot leave a trace in them. (nnU-Net
counts labeled voxels outside the nonzero region as inside when it normalizes within that region; here they stay out.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autossl.data.image_io import LoadedImage
from autossl.data.labels import LabelSchema
from autossl.data.parallel import free_memory
from autossl.data.prepared import ANNOTATED, CaseProperties, PreparedCase, Shape, Spacing
from autossl.data.problems import InvalidInput, Problem
from autossl.planners.plans import ConfigurationPlan, Plans
from autossl.preprocessing.crop import crop, nonzero_box, nonzero_region
from autossl.preprocessing.normalize import normalize_channel
from autossl.preprocessing.resample import find_coarse_axis, resample_image, resample_label_map, target_shape

LabelArray = npt.NDArray[np.integer[Any]]

MAX_LOCATIONS = 10_000  # per class, as nnU-Net v2
LOCATIONS_SEED = 1234
MAX_SMALL_VOXELS = 2**24
MAX_GROWTH = 1000
"""Voxels after resampling for one before, where they are more than `MAX_SMALL_VOXELS`: ten times finer on each axis."""
RESAMPLING_FUNCTION = "resample_data_or_seg_to_shape"

__all__ = [
    "CaseProperties",
    "PreparedCase",
    "prepare_case",
    "prepare_label",
    "sample_class_locations",
]


def prepare_case(image: LoadedImage, label: LabelArray | None, plans: Plans, configuration: str) -> PreparedCase:
    """A case as the network of a configuration sees it; with `label=None` what prediction needs.

    Args:
        image: as `read_image` gives it, in the plans' orientation.
        label: [z,y,x] on the image's grid, or None.

    Returns:
        Arrays in transposed order at the target spacing; without locations (`sample_class_locations`).

    Raises:
        InvalidInput: where the number of channels or the label's shape does not fit, or the plans ask for a resampling
            that does not exist here.
    """
    plan = plans.configuration(configuration)
    if image.array.shape[0] != plan.n_channels:
        raise InvalidInput(
            Problem(
                f"an image of {image.array.shape[0]} channels",
                f"{plan.n_channels} channels, as planned for {plans.dataset_name}",
                "give the files of all channels, in the order of dataset.json",
            )
        )
    array = image.array.transpose(0, *(axis + 1 for axis in plans.transpose_forward))
    properties = _properties(image, array, plans, configuration)
    cropped = crop(array, properties.crop_box)
    resampling = Resampling.of_images(plan).between(properties)
    mask = nonzero_region(cropped) if properties.has_nonzero_mask or _mixes_outside(label, properties) else None
    prepared = np.empty((plan.n_channels, *properties.shape), dtype=np.float32)
    for channel, scheme in enumerate(plan.normalization_schemes):
        normalized = normalize_channel(
            cropped[channel],
            scheme,
            plans.foreground_intensity_properties_per_channel.get(str(channel)),
            mask if plan.use_mask_for_norm[channel] else None,
        )
        prepared[channel] = resample_image(normalized[None], properties.shape, *resampling)[0]
    return PreparedCase(
        image=prepared,
        properties=properties,
        label=None if label is None else prepare_label(label, mask, properties, plan),
        nonzero=_resampled_mask(mask, properties, plan) if properties.has_nonzero_mask and mask is not None else None,
    )


def prepare_label(
    label: LabelArray, nonzero: npt.NDArray[np.bool_] | None, properties: CaseProperties, plan: ConfigurationPlan
) -> LabelArray:
    """A label map on the prepared grid, int8, or wider where a value needs it.

    Args:
        label: [z,y,x] on the image's grid.
        nonzero: `nonzero_region` of the cropped image, transposed order; needed where the case is resampled:
            background outside of it counts as a class of its own in the vote of a voxel's surroundings, as in nnU-Net.
        properties: of the prepared image.

    Raises:
        InvalidInput: where the label's shape is not the image's.
    """
    expected = tuple(properties.shape_before_crop[axis] for axis in properties.transpose_backward)
    if tuple(label.shape) != expected:
        raise InvalidInput(
            Problem(
                f"a label of {tuple(label.shape)} voxels (z,y,x)",
                f"{expected}, the shape of its image",
                "resample the label onto the grid of its image",
            )
        )
    kept = crop(label.transpose(properties.transpose_forward), properties.crop_box)
    if properties.shape != properties.shape_after_crop:
        voters: LabelArray = kept.astype(np.int32 if int(kept.max()) > np.iinfo(np.int16).max else np.int16)
        if nonzero is not None:
            voters[(voters == 0) & ~nonzero] = -1
        kept = resample_label_map(voters, properties.shape, *Resampling.of_labels(plan).between(properties))
        kept = np.maximum(kept, 0)
    highest = int(kept.max())
    narrow = next(kind for kind in (np.int8, np.int16, np.int32) if highest <= np.iinfo(kind).max)
    return np.ascontiguousarray(kept, dtype=narrow)


def sample_class_locations(label: LabelArray, schema: LabelSchema) -> dict[str, LabelArray]:
    """Up to 10 000 voxels [n,3] per foreground class or region, drawn without repetition, always the same ones.

    Where the schema has an ignore label, `ANNOTATED` names voxels that carry any other label, background included.
    """
    generator = np.random.default_rng(LOCATIONS_SEED)
    flat = label.reshape(-1)
    foreground = np.flatnonzero(flat)
    values = flat[foreground]
    found = {name: foreground[_is_any(values, members)] for name, members in schema.foreground.items()}
    if schema.ignore_label is not None:
        found[ANNOTATED] = np.flatnonzero(flat != schema.ignore_label)
    kind = np.int16 if max(label.shape) <= np.iinfo(np.int16).max else np.int32
    result: dict[str, LabelArray] = {}
    for name, voxels in found.items():
        if len(voxels) > MAX_LOCATIONS:
            voxels = generator.choice(voxels, MAX_LOCATIONS, replace=False)
        result[name] = np.stack(np.unravel_index(voxels, label.shape), axis=1).astype(kind)
    return result


@dataclass(frozen=True)
class Resampling:
    """How a plan wants arrays to be resampled."""

    order: int
    force_separate_z: bool | None

    @classmethod
    def of_images(cls, plan: ConfigurationPlan) -> Resampling:
        """For images."""
        return cls._checked(plan.resampling_fn_data, plan.resampling_fn_data_kwargs, "resampling_fn_data")

    @classmethod
    def of_labels(cls, plan: ConfigurationPlan) -> Resampling:
        """For label maps."""
        return cls._checked(plan.resampling_fn_seg, plan.resampling_fn_seg_kwargs, "resampling_fn_seg")

    def between(self, properties: CaseProperties) -> tuple[int, int | None]:
        """Order and coarse axis for a case."""
        return self.order, find_coarse_axis(properties.spacing_mm, properties.target_spacing_mm, self.force_separate_z)

    @classmethod
    def _checked(cls, function: str, arguments: Mapping[str, Any], key: str) -> Resampling:
        faults = [] if function == RESAMPLING_FUNCTION else [f"{key} is {function}"]
        known = {"is_seg", "order", "order_z", "force_separate_z"}
        faults += [f"{key}_kwargs has {name}" for name in sorted(set(arguments) - known)]
        orders = (0, 1) if arguments.get("is_seg") else range(6)
        if arguments.get("order") not in orders:
            faults.append(f"{key}_kwargs.order is {repr(arguments.get('order'))[:80]}")
        if arguments.get("order_z", 0) != 0:
            faults.append(f"{key}_kwargs.order_z is {repr(arguments['order_z'])[:80]}")
        if arguments.get("force_separate_z") not in (None, True, False):
            faults.append(f"{key}_kwargs.force_separate_z is {repr(arguments['force_separate_z'])[:80]}")
        if faults:
            raise InvalidInput(
                Problem(
                    "; ".join(faults),
                    f"{RESAMPLING_FUNCTION} with order 0 to 5 (labels: 0 or 1), order_z 0 and force_separate_z",
                    "undo the edit of the plans, or plan again",
                )
            )
        return cls(int(arguments["order"]), arguments.get("force_separate_z"))


def _is_any(values: LabelArray, members: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    return values == members[0] if len(members) == 1 else np.isin(values, members)


def _properties(image: LoadedImage, array: npt.NDArray[np.float32], plans: Plans, configuration: str) -> CaseProperties:
    plan = plans.configuration(configuration)
    z, y, x = (float(image.spacing_zyx_mm[axis]) for axis in plans.transpose_forward)
    spacing: Spacing = (z, y, x)
    target: Any = plan.spacing if plan.dims == 3 else (z, *plan.spacing)
    box = nonzero_box(array)
    before: Any = array.shape[1:]
    shape: Any = target_shape([end - start for start, end in box], spacing, target)
    _check_growth(before, shape, spacing, target, plan.n_channels)
    if min(shape) < 1:
        raise InvalidInput(
            Problem(
                f"an image of {before} voxels and {spacing} mm has no voxel left at {tuple(target)} mm",
                "at least half a target voxel on each axis",
                "check the spacing in the image's header, or plan with another --overwrite_target_spacing",
            )
        )
    return CaseProperties(
        geometry=image.geometry,
        transpose_forward=plans.transpose_forward,
        spacing_mm=spacing,
        target_spacing_mm=(float(target[0]), float(target[1]), float(target[2])),
        shape_before_crop=before,
        crop_box=box,
        shape=shape,
        has_nonzero_mask=any(
            masked and scheme == "ZScoreNormalization"
            for masked, scheme in zip(plan.use_mask_for_norm, plan.normalization_schemes, strict=True)
        ),
        values_hash=plans.data_hash(configuration, z),
    )


def _check_growth(before: Shape, shape: Shape, spacing: Spacing, target: Spacing, n_channels: int) -> None:
    """A spacing that is wrong in a header or a plan can ask for an array of any size."""
    voxels = math.prod(shape)
    bytes_needed = 4 * voxels * (n_channels + 1)
    allowed = max(MAX_SMALL_VOXELS, MAX_GROWTH * math.prod(before))
    if voxels <= MAX_SMALL_VOXELS:
        return
    if voxels > allowed or bytes_needed > free_memory():
        found = f"an image of {before} voxels and {spacing} mm becomes {tuple(shape)} voxels at {tuple(target)} mm"
        raise InvalidInput(
            Problem(
                f"{found}, {bytes_needed / 2**30:.1f} GiB of memory",
                f"at most {MAX_GROWTH} times its voxels, and what memory there is",
                "check the spacing in the image's header and in the plan",
            )
        )


def _mixes_outside(label: LabelArray | None, properties: CaseProperties) -> bool:
    return label is not None and properties.shape != properties.shape_after_crop


def _resampled_mask(
    mask: npt.NDArray[np.bool_], properties: CaseProperties, plan: ConfigurationPlan
) -> npt.NDArray[np.bool_]:
    shape: Shape = properties.shape
    # Outside is -1 in nnU-Net's label map: of two equal shares without the nearest voxel's, the outside takes it.
    return resample_label_map(mask.astype(np.int8), shape, *Resampling.of_labels(plan).between(properties)) > 0
