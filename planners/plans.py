"""The schema of plans: nnU-Net v2's key names with plain values, our semi-supervised decisions beside them, and why.

All spatial sequences are in array order of the *transposed* case (coarsest axis first); spacing in mm.
A 2d configuration has two entries per spatial sequence: the first array axis is its slice axis and is never resampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autossl.data.files import content_hash, read_json, write_json
from autossl.data.problems import InvalidInput, Problem, nearest, schema_faults

NORMALIZATION_SCHEMES = (
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)
NETWORK_CLASSES = {
    "plain": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "resenc": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
}
KEYS_THAT_NAME_MODULES = ("conv_op", "norm_op", "dropout_op", "nonlin")
SHARES_OF_MODULES = ("eps", "momentum", "p", "negative_slope")
SWITCHES_OF_MODULES = ("affine", "track_running_stats", "inplace")
"""All arguments that the norms, dropouts and activations of such networks can have; the shares are 0 to 1."""
MAX_PATCH_VOXELS = 2**27  # 512 cubed: anything above is a damaged or hostile plan, not a plan
MAX_BATCH = 100_000
MAX_BATCH_VOXELS = 2**31
MAX_LAYERS = 64
"""Per stage; nnU-Net's have 2 to 6."""
MAX_WEIGHTS = 2**28
"""About, of a network: 1 GiB in float32. nnU-Net's largest preset has half of that."""
MAX_STEPS = 10**9
SPACING_MM = (1e-6, 1e6)
"""Of a target grid, and of the sizes in voxels."""
NNUNET_LEARNING_RATE = 1e-2
NNUNET_MOMENTUM = 0.99
DATA_KEYS = (
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
OUR_PLAN_KEYS = ("preset", "orientation", "semi_supervised", "why")
OUR_CONFIGURATION_KEYS = ("mirror_axes", "labeled_batch_size", "unlabeled_batch_size", "learning_rate", "momentum")


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Architecture(_Schema):
    """A network as nnU-Net v2 names it. `arch_kwargs` may hold dotted names of torch modules under the listed keys."""

    network_class_name: str
    arch_kwargs: dict[str, Any]
    kw_requires_import: tuple[str, ...] = Field(default=KEYS_THAT_NAME_MODULES, alias="_kw_requires_import")
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @field_validator("network_class_name")
    @classmethod
    def _known_class(cls, value: str) -> str:
        if value not in NETWORK_CLASSES.values():
            raise ValueError(f"{value} is not one of {', '.join(NETWORK_CLASSES.values())}")
        return value

    @model_validator(mode="after")
    def _stages_agree(self) -> Architecture:
        kwargs = self.arch_kwargs
        stages = kwargs.get("n_stages")
        if not isinstance(stages, int) or not 1 <= stages <= 16:
            raise ValueError(f"arch_kwargs.n_stages is {stages!r}, expected 1 to 16")
        for key in ("features_per_stage", "kernel_sizes", "strides"):
            given = kwargs.get(key, ())
            if not isinstance(given, list | tuple):
                raise ValueError(f"arch_kwargs.{key} is {str(given)[:80]}, expected a list of {stages} entries")
            if len(given) != stages:
                raise ValueError(f"arch_kwargs.{key} has {len(given)} entries, expected {stages}")
        if any(not _is_count(f, 4096) for f in kwargs["features_per_stage"]):
            raise ValueError("arch_kwargs.features_per_stage must be integers from 1 to 4096")
        for key, largest in (("strides", 8), ("kernel_sizes", 31)):
            _check_per_axis(key, kwargs[key], largest)
        if len(kwargs["strides"][0]) != len(kwargs["kernel_sizes"][0]):
            raise ValueError("arch_kwargs.strides and arch_kwargs.kernel_sizes differ in their number of axes")
        _check_layers(kwargs)
        _check_modules(kwargs, {*KEYS_THAT_NAME_MODULES, *self.kw_requires_import}, self.dims)
        return self

    @property
    def dims(self) -> int:
        """Spatial dimensions, 2 or 3."""
        return len(self.arch_kwargs["strides"][0])

    @property
    def cumulative_strides(self) -> list[tuple[int, ...]]:
        """Down-sampling factor per axis of each stage against the input."""
        total = [1] * self.dims
        result = []
        for stride in self.arch_kwargs["strides"]:
            total = [t * int(s) for t, s in zip(total, stride, strict=True)]
            result.append(tuple(total))
        return result


class ConfigurationPlan(_Schema):
    """One configuration (`2d`, `3d_fullres`, `3d_lowres`) of a plan."""

    data_identifier: str
    preprocessor_name: Literal["DefaultPreprocessor"] = "DefaultPreprocessor"
    batch_size: int = Field(ge=1, le=MAX_BATCH)
    patch_size: tuple[int, ...]
    median_image_size_in_voxels: tuple[float, ...]
    spacing: tuple[float, ...]
    normalization_schemes: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    resampling_fn_data: str = "resample_data_or_seg_to_shape"
    resampling_fn_seg: str = "resample_data_or_seg_to_shape"
    resampling_fn_data_kwargs: dict[str, Any] = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    resampling_fn_seg_kwargs: dict[str, Any] = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
    resampling_fn_probabilities: str = "resample_data_or_seg_to_shape"
    resampling_fn_probabilities_kwargs: dict[str, Any] = {
        "is_seg": False,
        "order": 1,
        "order_z": 0,
        "force_separate_z": None,
    }
    architecture: Architecture
    batch_dice: bool
    mirror_axes: tuple[int, ...]
    """Axes of the patch (0 = first spatial axis) that may be mirrored, in training and in prediction."""
    labeled_batch_size: int = Field(ge=1, le=MAX_BATCH)
    unlabeled_batch_size: int = Field(ge=1, le=MAX_BATCH)
    learning_rate: float = Field(default=NNUNET_LEARNING_RATE, gt=0, le=1)
    """Of SGD, at the first step."""
    momentum: float = Field(default=NNUNET_MOMENTUM, ge=0, lt=1)
    """Nesterov's."""

    @field_validator("patch_size")
    @classmethod
    def _patch(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) not in (2, 3) or any(v < 1 for v in value) or math.prod(value) > MAX_PATCH_VOXELS:
            raise ValueError(f"{value} is no patch: expected 2 or 3 positive numbers, at most 512 cubed voxels in all")
        return value

    @field_validator("spacing", "median_image_size_in_voxels")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not SPACING_MM[0] <= v <= SPACING_MM[1] for v in value):
            raise ValueError(f"{value} must be positive numbers from {SPACING_MM[0]:g} to {SPACING_MM[1]:g}")
        return value

    @field_validator("normalization_schemes")
    @classmethod
    def _schemes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for scheme in value:
            if scheme not in NORMALIZATION_SCHEMES:
                raise ValueError(f"{scheme} is unknown; nearest: {nearest(scheme, NORMALIZATION_SCHEMES)}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> ConfigurationPlan:
        dims = len(self.patch_size)
        for key in ("median_image_size_in_voxels", "spacing"):
            if len(getattr(self, key)) != dims:
                raise ValueError(f"{key} has {len(getattr(self, key))} axes, patch_size has {dims}")
        if len(self.use_mask_for_norm) != len(self.normalization_schemes):
            raise ValueError("use_mask_for_norm and normalization_schemes differ in length (one entry per channel)")
        if self.architecture.dims != dims:
            raise ValueError(f"architecture is {self.architecture.dims}D, patch_size is {dims}D")
        if any(axis not in range(dims) for axis in self.mirror_axes):
            raise ValueError(f"mirror_axes {self.mirror_axes} must lie in 0..{dims - 1}")
        factors = self.architecture.cumulative_strides[-1]
        if any(p % f for p, f in zip(self.patch_size, factors, strict=True)):
            raise ValueError(f"patch_size {self.patch_size} is not divisible by the network's total strides {factors}")
        batch = max(self.batch_size, self.labeled_batch_size, self.unlabeled_batch_size)
        if batch * math.prod(self.patch_size) > MAX_BATCH_VOXELS:
            raise ValueError(f"batches of {batch} patches of {self.patch_size} voxels, more than {MAX_BATCH_VOXELS:,}")
        return self

    @property
    def dims(self) -> int:
        """Spatial dimensions of the patch, 2 or 3."""
        return len(self.patch_size)

    @property
    def n_channels(self) -> int:
        """Image channels."""
        return len(self.normalization_schemes)


class IntensityProperties(_Schema):
    """Of one channel, over the labeled foreground, in the image's own units."""

    mean: float
    std: float
    min: float
    max: float
    median: float
    percentile_00_5: float
    percentile_99_5: float


class SemiSupervisedPlan(_Schema):
    """Decisions that the unlabeled cases ask for; fractions are of the whole run."""

    total_steps: int = Field(ge=1, le=MAX_STEPS)
    warm_up_fraction: float = Field(ge=0, le=1)
    ramp_end_fraction: float = Field(ge=0)
    ema_decay_max: float = Field(ge=0, lt=1)
    single_component_classes: tuple[int, ...]
    """Output channels whose classes are one piece in the labeled cases (softmax: the first class is 1; regions: 0)."""
    elliptic_classes: tuple[int, ...]
    """Output channels whose classes are ellipses or ellipsoids in the labeled cases."""
    recommended_configuration: str
    recommended_method: str


class Plans(_Schema):
    """All that a dataset's fingerprint decided, for one preset. `why` maps a dotted path in here to its reason."""

    dataset_name: str
    plans_name: str
    preset: str
    orientation: Literal["RAS", "native"]
    """RAS: volumes are reoriented to RAS+ before the arrays (z,y,x) are taken. native: as stored (2D images)."""
    image_reader_writer: str
    """The nnU-Net v2 reader that gives the same arrays; for exports."""
    original_median_spacing_after_transp: tuple[float, float, float]
    original_median_shape_after_transp: tuple[int, int, int]
    transpose_forward: tuple[int, int, int]
    transpose_backward: tuple[int, int, int]
    configurations: dict[str, ConfigurationPlan]
    experiment_planner_used: str
    label_manager: str = "LabelManager"
    foreground_intensity_properties_per_channel: dict[str, IntensityProperties]
    semi_supervised: SemiSupervisedPlan
    why: dict[str, str]

    @model_validator(mode="after")
    def _names_are_plain(self) -> Plans:
        """Names become parts of paths and stand in reports."""
        for name in (self.dataset_name, self.plans_name, self.preset, *self.configurations):
            if not name.strip(".") or not name.isprintable() or len(name) > 200 or any(sign in name for sign in "/\\:"):
                raise ValueError(f"the name {name[:80]!a} cannot be a part of a file name")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Plans:
        forward, backward = self.transpose_forward, self.transpose_backward
        if sorted(forward) != [0, 1, 2] or [forward[b] for b in backward] != [0, 1, 2]:
            raise ValueError(f"transpose_forward {forward} and transpose_backward {backward} do not undo each other")
        channels = {c.n_channels for c in self.configurations.values()}
        if len(channels) > 1:
            raise ValueError(f"configurations disagree on the number of channels: {sorted(channels)}")
        recommended = self.semi_supervised.recommended_configuration
        if recommended not in self.configurations:
            raise ValueError(
                f"semi_supervised.recommended_configuration '{recommended}' is not in configurations "
                f"({', '.join(self.configurations) or 'there are none'})"
            )
        self._check_intensities()
        return self

    def _check_intensities(self) -> None:
        """Channels that are normalized by the dataset's intensities need them."""
        for name, plan in self.configurations.items():
            for channel, scheme in enumerate(plan.normalization_schemes):
                known = self.foreground_intensity_properties_per_channel
                if scheme == "CTNormalization" and str(channel) not in known:
                    raise ValueError(
                        f"configurations.{name}.normalization_schemes: channel {channel} is CTNormalization, but "
                        f"foreground_intensity_properties_per_channel has {', '.join(known) or 'no channel'}"
                    )

    def configuration(self, name: str) -> ConfigurationPlan:
        """The named configuration; raises `InvalidInput` with the nearest names."""
        if name not in self.configurations:
            raise InvalidInput(
                Problem(
                    f"configuration '{name}' is not in {self.plans_name} of {self.dataset_name}",
                    f"one of {nearest(name, self.configurations)}",
                    f"plan it with autossl_plan_and_preprocess -d {self.dataset_name} -c {name}, or choose another",
                )
            )
        return self.configurations[name]

    def data_parameters(self, configuration: str, slice_spacing_mm: float | None = None) -> dict[str, Any]:
        """All that decides preprocessed values, as plain values.

        `slice_spacing_mm` is a case's own spacing on the first axis; given, a 2d configuration's spacing gets it as
        its first entry, so that a case that 2d and 3d prepare alike has the same parameters in both.
        """
        plan = self.configuration(configuration)
        content = plan.model_dump(mode="json", include=set(DATA_KEYS))
        if plan.dims == 2 and slice_spacing_mm is not None:
            content["spacing"] = [float(slice_spacing_mm), *content["spacing"]]
        content |= {"transpose_forward": list(self.transpose_forward), "orientation": self.orientation}
        if "CTNormalization" in plan.normalization_schemes:
            content["intensities"] = {
                key: value.model_dump() for key, value in self.foreground_intensity_properties_per_channel.items()
            }
        return content

    def data_hash(self, configuration: str, slice_spacing_mm: float | None = None) -> str:
        """Hash of `data_parameters`; presets and configurations that agree share their data."""
        return content_hash(self.data_parameters(configuration, slice_spacing_mm))

    def to_json(self) -> dict[str, Any]:
        """Plain values under nnU-Net's key names."""
        return self.model_dump(mode="json", by_alias=True)

    def to_nnunet_json(self) -> dict[str, Any]:
        """The same decisions as nnU-Net v2 writes them: without our fields, with the cascade that 3d_lowres brings.

        The cascade is nnU-Net's own: it is named for that program's sake and cannot be trained here.
        """
        content = {key: value for key, value in self.to_json().items() if key not in OUR_PLAN_KEYS}
        content["configurations"] = {
            name: {key: value for key, value in plan.items() if key not in OUR_CONFIGURATION_KEYS}
            for name, plan in content["configurations"].items()
        }
        if {"3d_lowres", "3d_fullres"} <= set(content["configurations"]):
            content["configurations"]["3d_lowres"]["next_stage"] = "3d_cascade_fullres"
            content["configurations"]["3d_cascade_fullres"] = {
                "inherits_from": "3d_fullres",
                "previous_stage": "3d_lowres",
            }
        return content

    def hash(self) -> str:
        """Hash of every decision; the reasons are left out."""
        return content_hash({key: value for key, value in self.to_json().items() if key != "why"})


def _is_count(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def _check_per_axis(key: str, stages: Any, largest: int) -> None:
    """Every stage holds 2 or 3 integers, the same number in each."""
    for stage in stages:
        if not isinstance(stage, list | tuple) or len(stage) not in (2, 3) or len(stage) != len(stages[0]):
            raise ValueError(f"arch_kwargs.{key} holds {stage!r}, expected 2 or 3 integers per stage, as many in each")
        if any(not _is_count(value, largest) for value in stage):
            raise ValueError(f"arch_kwargs.{key} holds {stage!r}, expected integers from 1 to {largest}")


def _check_layers(kwargs: dict[str, Any]) -> None:
    """Numbers of layers, and about how many weights all of them have, before anything is built."""
    features, kernels = kwargs["features_per_stage"], kwargs["kernel_sizes"]
    layers = 1
    for key in ("n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder"):
        given = kwargs.get(key, 1)
        counts = list(given) if isinstance(given, list | tuple) else [given]
        stages = len(features) - (key == "n_conv_per_stage_decoder")
        if any(not _is_count(count, MAX_LAYERS) for count in counts):
            raise ValueError(f"arch_kwargs.{key} is {str(given)[:80]}, expected integers from 1 to {MAX_LAYERS}")
        if isinstance(given, list | tuple) and len(counts) != stages:
            raise ValueError(f"arch_kwargs.{key} has {len(counts)} entries, expected {stages}")
        layers = max([layers, *counts])
    weights = sum(layers * width**2 * math.prod(kernel) for width, kernel in zip(features, kernels, strict=True))
    if weights > MAX_WEIGHTS:
        raise ValueError(f"arch_kwargs: a network of about {weights:,} weights, expected at most {MAX_WEIGHTS:,}")


def _check_modules(kwargs: dict[str, Any], keys: Iterable[str], dims: int) -> None:
    """Names of modules, and what goes into them: PyTorch would take anything and fail in the first forward pass."""
    for key in sorted(keys):
        name = kwargs.get(key)
        if name is not None and not isinstance(name, str):
            raise ValueError(f"arch_kwargs.{key} is {str(name)[:80]}, expected the name of a torch module")
        if name is not None and name[-2:] in ("2d", "3d") and name[-2:] != f"{dims}d":
            raise ValueError(f"arch_kwargs.{key} is {name}, in a network of {dims} dimensions")
        given = kwargs.get(f"{key}_kwargs") or {}
        if not isinstance(given, dict):
            raise ValueError(f"arch_kwargs.{key}_kwargs is {str(given)[:80]}, expected names with values")
        for argument, value in given.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if argument in SHARES_OF_MODULES:
                fits, expected = is_number and 0 <= value <= 1, "a number from 0 to 1"
            elif argument in SWITCHES_OF_MODULES:
                fits, expected = isinstance(value, bool), "true or false"
            else:
                fits, expected = False, f"one of {', '.join(SHARES_OF_MODULES + SWITCHES_OF_MODULES)}"
            if not fits:
                raise ValueError(f"arch_kwargs.{key}_kwargs holds {argument}: {str(value)[:80]}, expected {expected}")


def read_plans(path: Path) -> Plans:
    """Reads and checks plans; raises `InvalidInput` that names each field that makes no sense."""
    content = read_json(path)
    try:
        return Plans.model_validate(content)
    except ValidationError as error:
        expected, fix = "plans as autossl_plan_and_preprocess writes them", "undo the edit of this field or plan again"
        problems = [Problem(fault, expected, fix, file=path) for fault in schema_faults(error, "the plan")]
        raise InvalidInput(
            problems, title=f"{path} makes no sense in {len(problems)} place{'s'[: len(problems) > 1]}:"
        ) from error


def write_plans(path: Path, plans: Plans) -> None:
    """Writes plans atomically."""
    write_json(path, plans.to_json())
