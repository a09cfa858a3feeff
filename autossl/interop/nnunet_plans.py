"""nnU-Net v2's plans.json as plans of ours: one configuration, with what prediction has to do as nnU-Net does it.

Whatever would change a prediction and does not exist here is refused, all of it together. What nnU-Net's plans do not
say, and only training asks for, is filled in, with its why.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autossl.data.geometry import Orientation
from autossl.data.problems import InvalidInput, Problem, schema_faults
from autossl.planners.plans import (
    DATA_KEYS,
    KEYS_THAT_NAME_MODULES,
    NETWORK_CLASSES,
    ConfigurationPlan,
    IntensityProperties,
    Plans,
)
from autossl.planners.semi_supervised import ema_decay_max

ORIENTATION_OF_READER: dict[str, Orientation] = {
    "NibabelIOWithReorient": "RAS",
    "NibabelIO": "native",
    "SimpleITKIO": "native",
    "NaturalImage2DIO": "native",
}
"""nnU-Net's reader → the orientation whose arrays equal its own."""
NETWORK_NAMES = {
    "PlainConvUNet": NETWORK_CLASSES["plain"],
    "dynamic_network_architectures.architectures.unet.PlainConvUNet": NETWORK_CLASSES["plain"],
    "ResidualEncoderUNet": NETWORK_CLASSES["resenc"],
    "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet": NETWORK_CLASSES["resenc"],
    "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet": NETWORK_CLASSES["resenc"],
}
RESAMPLING = "resample_data_or_seg_to_shape"
LOGITS_KWARGS = {"order": 1, "order_z": 0, "force_separate_z": None}
"""How logits go back to the image's grid here."""
INTENSITIES = "foreground_intensity_properties_per_channel"
OLD_INTENSITIES = "foreground_intensity_properties_by_modality"
PLAIN_KEYS = ("patch_size", "spacing", "normalization_schemes", "use_mask_for_norm", *DATA_KEYS[3:])
"""Of a configuration, taken as they are."""
OPTIONAL_KEYS = ("resampling_fn_probabilities", "resampling_fn_probabilities_kwargs", "preprocessor_name")
MIN_BATCH = 2
FIX = "predict with nnUNetv2_predict, or import a model of nnU-Net's default preprocessing and U-Nets"


def imported_plans(
    content: Any,
    configuration: str,
    mirror_axes: Sequence[int],
    dataset: str,
    preset: str,
    total_steps: int,
    file: Path | None = None,
) -> Plans:
    """Plans that predict as nnU-Net does.

    Args:
        content: of nnU-Net's plans.json.
        configuration: that the model was trained with.
        mirror_axes: of its checkpoint.
        dataset: that the model will belong to.
        preset: name for these plans.
        total_steps: of the model's training.
        file: for messages.

    Raises:
        InvalidInput: what does not exist here or makes no sense, all of it.
    """
    if not isinstance(content, dict) or not isinstance(content.get("configurations"), dict):
        expected = "nnU-Net v2's plans with configurations"
        raise InvalidInput(Problem("plans without configurations", expected, "restore the file", file=file))
    plan = resolved_configuration(content["configurations"], configuration, file)
    problems = [Problem(found, expected, FIX, file=file) for found, expected in _foreign(content, plan)]
    if problems:
        raise InvalidInput(problems)
    try:
        ours = _configuration(content, configuration, plan, mirror_axes)
        return Plans.model_validate(_plans(content, configuration, ours, dataset, preset, total_steps))
    except ValidationError as error:
        expected = "plans as nnU-Net v2 writes them"
        problems = [Problem(fault, expected, FIX, file=file) for fault in schema_faults(error)]
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        problems = [
            Problem(f"plans that make no sense ({error!r:.200})", "plans as nnU-Net writes them", FIX, file=file)
        ]
    raise InvalidInput(problems)


def resolved_configuration(configurations: Mapping[str, Any], name: str, file: Path | None = None) -> dict[str, Any]:
    """A configuration with what it inherits.

    Raises:
        InvalidInput: it, or one that it inherits from, is not there, or they inherit from each other.
    """
    result: dict[str, Any] = {}
    wanted, seen = name, [name]
    while True:
        found = configurations.get(wanted)
        if not isinstance(found, dict):
            known = ", ".join(map(str, configurations)) or "none"
            raise InvalidInput(
                Problem(f"no configuration '{wanted}' in the plans", f"one of {known}", "restore the file", file=file)
            )
        result = copy.deepcopy(found) | result
        if "inherits_from" not in found:
            return {key: value for key, value in result.items() if key != "inherits_from"}
        wanted = str(found["inherits_from"])
        if wanted in seen:
            found_text = f"configurations that inherit from each other: {', '.join(seen)}"
            raise InvalidInput(Problem(found_text, "an end to it", "restore the file", file=file))
        seen.append(wanted)


def _foreign(content: Mapping[str, Any], plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What prediction would have to do and cannot: found, expected."""
    faults = []
    reader = content.get("image_reader_writer")
    if reader not in ORIENTATION_OF_READER:
        faults.append((f"image_reader_writer is {reader!r}", f"one of {', '.join(ORIENTATION_OF_READER)}"))
    if content.get("label_manager", "LabelManager") != "LabelManager":
        faults.append((f"label_manager is {content['label_manager']!r}", "LabelManager"))
    if plan.get("previous_stage") is not None:
        faults.append(("the second stage of a cascade, which takes another model's prediction", "a model of one stage"))
    for key, default in (
        ("preprocessor_name", "DefaultPreprocessor"),
        *((f"resampling_fn_{k}", RESAMPLING) for k in ("data", "seg", "probabilities")),
    ):
        if plan.get(key, default) != default:
            faults.append((f"{key} is {plan[key]!r}", default))
    for key, orders in (("data", range(6)), ("seg", (0, 1))):
        kwargs = plan.get(f"resampling_fn_{key}_kwargs")
        if isinstance(kwargs, dict) and (kwargs.get("order") not in orders or kwargs.get("order_z", 0) != 0):
            faults.append((f"resampling_fn_{key}_kwargs is {kwargs}", f"order {orders[0]} to {orders[-1]}, order_z 0"))
    logits = plan.get("resampling_fn_probabilities_kwargs")
    given = {key: logits.get(key, value) for key, value in LOGITS_KWARGS.items()} if isinstance(logits, dict) else None
    if given is not None and given != LOGITS_KWARGS:
        faults.append((f"resampling_fn_probabilities_kwargs is {logits}", f"{LOGITS_KWARGS}"))
    network = _network_name(plan)
    if network not in NETWORK_NAMES:
        faults.append((f"the network is {network!r}", "PlainConvUNet or ResidualEncoderUNet"))
    return faults


def _network_name(plan: Mapping[str, Any]) -> Any:
    architecture = plan.get("architecture")
    return architecture.get("network_class_name") if isinstance(architecture, dict) else plan.get("UNet_class_name")


def _configuration(
    content: Mapping[str, Any], name: str, plan: Mapping[str, Any], mirror_axes: Sequence[int]
) -> ConfigurationPlan:
    batch = plan.get("batch_size", MIN_BATCH)
    values = {key: plan[key] for key in (*PLAIN_KEYS, *OPTIONAL_KEYS) if key in plan}
    return ConfigurationPlan.model_validate(
        values
        | {
            "data_identifier": plan.get("data_identifier", f"{content.get('plans_name', 'nnUNetPlans')}_{name}"),
            "median_image_size_in_voxels": plan.get("median_image_size_in_voxels", plan.get("patch_size")),
            "architecture": _architecture(plan),
            "batch_size": batch,
            "labeled_batch_size": batch,
            "unlabeled_batch_size": batch,
            "batch_dice": plan.get("batch_dice", False),
            "mirror_axes": tuple(mirror_axes),
        }
    )


def _architecture(plan: Mapping[str, Any]) -> dict[str, Any]:
    """As recent plans have it; made from the flat keys of the first releases where it is missing."""
    given = plan.get("architecture")
    if isinstance(given, dict):
        kept = {key: given[key] for key in ("arch_kwargs", "_kw_requires_import") if key in given}
        return kept | {"network_class_name": NETWORK_NAMES[_network_name(plan)]}
    kind, dims = plan["UNet_class_name"], len(plan["patch_size"])
    stages = len(plan["n_conv_per_stage_encoder"])
    limit, base = plan["unet_max_num_features"], plan["UNet_base_num_features"]
    kwargs = {
        "n_stages": stages,
        "features_per_stage": [min(base * 2**stage, limit) for stage in range(stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": plan["conv_kernel_sizes"],
        "strides": plan["pool_op_kernel_sizes"],
        "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage": plan["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": plan["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": NETWORK_NAMES[kind],
        "arch_kwargs": kwargs,
        "_kw_requires_import": list(KEYS_THAT_NAME_MODULES),
    }


def _plans(
    content: Mapping[str, Any],
    configuration: str,
    plan: ConfigurationPlan,
    dataset: str,
    preset: str,
    total_steps: int,
) -> dict[str, Any]:
    reader = content["image_reader_writer"]
    spacing, shape = ((1.0, *values)[-3:] for values in (plan.spacing, plan.median_image_size_in_voxels))
    medians = [content.get(f"original_median_{what}_after_transp") for what in ("spacing", "shape")]
    return {
        "dataset_name": dataset,
        "plans_name": str(content.get("plans_name", "nnUNetPlans")),
        "preset": preset,
        "orientation": ORIENTATION_OF_READER[reader],
        "image_reader_writer": reader,
        "original_median_spacing_after_transp": medians[0] or spacing,
        "original_median_shape_after_transp": [round(size) for size in medians[1] or shape],
        "transpose_forward": content["transpose_forward"],
        "transpose_backward": content["transpose_backward"],
        "configurations": {configuration: plan.model_dump(by_alias=True)},
        "experiment_planner_used": str(content.get("experiment_planner_used", "ExperimentPlanner")),
        INTENSITIES: _intensities(content, plan),
        "semi_supervised": {
            "total_steps": total_steps,
            "warm_up_fraction": 0,
            "ramp_end_fraction": 0,
            "ema_decay_max": ema_decay_max(total_steps),
            "single_component_classes": (),
            "elliptic_classes": (),
            "recommended_configuration": configuration,
            "recommended_method": "supervised",
        },
        "why": {
            "orientation": f"nnU-Net's reader {reader} gives arrays in this order",
            f"configurations.{configuration}.mirror_axes": "as the imported checkpoint says",
            "semi_supervised": "not measured: an imported model's plans know no unlabeled case",
        },
    }


def _intensities(content: Mapping[str, Any], plan: ConfigurationPlan) -> dict[str, Any]:
    """Per channel; what only training looks at may be missing, and so may channels that are not normalized by it."""
    given = content.get(INTENSITIES, content.get(OLD_INTENSITIES)) or {}
    result: dict[str, Any] = {}
    for channel, scheme in enumerate(plan.normalization_schemes):
        entry = given.get(str(channel))
        if not isinstance(entry, dict):
            continue
        known = {key: entry[key] for key in IntensityProperties.model_fields if key in entry}
        guesses = {
            "min": known.get("percentile_00_5"),
            "max": known.get("percentile_99_5"),
            "median": known.get("mean"),
        }
        values = {**guesses, **known}
        whole = all(_is_finite(values.get(key)) for key in IntensityProperties.model_fields)
        if whole or scheme == "CTNormalization":
            result[str(channel)] = values
    return result


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
