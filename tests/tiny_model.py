"""Trained runs of a few weights, written as training writes them, and folders of small images to predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from PIL import Image
from torch import nn

from autossl.data.files import write_json
from autossl.data.runs import RunSpec
from autossl.inference.checkpoint import FORMAT
from autossl.networks.build import build_network
from autossl.networks.prediction import Member, PredictionSpec
from autossl.planners.plans import Plans, write_plans
from toys import toy_architecture, toy_configuration

DATASET = "Dataset999_Tiny"


def tiny_plans(n_channels: int = 1, dims: int = 3, orientation: str = "RAS", **changes: Any) -> Plans:
    """Plans with one configuration: `3d_fullres` or `2d`, patch 8 per axis, spacing 1 mm."""
    configuration = toy_configuration(
        dims,
        n_channels,
        **({"patch_size": (8,) * dims, "architecture": toy_architecture(dims, (2, 4)), "mirror_axes": (0,)} | changes),
    )
    name = "2d" if dims == 2 else "3d_fullres"
    intensities = {"mean": 0, "std": 1, "min": -1, "max": 1, "median": 0, "percentile_00_5": -1, "percentile_99_5": 1}
    decisions = {"total_steps": 10, "warm_up_fraction": 0, "ramp_end_fraction": 0, "ema_decay_max": 0.9}
    return Plans.model_validate(
        {
            "dataset_name": DATASET,
            "plans_name": "plans_tiny",
            "preset": "tiny",
            "orientation": orientation,
            "image_reader_writer": "NibabelIOWithReorient",
            "original_median_spacing_after_transp": (1, 1, 1),
            "original_median_shape_after_transp": (8, 8, 8),
            "transpose_forward": (0, 1, 2),
            "transpose_backward": (0, 1, 2),
            "configurations": {name: configuration.model_dump(by_alias=True)},
            "experiment_planner_used": "tiny",
            "foreground_intensity_properties_per_channel": {str(c): intensities for c in range(n_channels)},
            "semi_supervised": decisions
            | {
                "single_component_classes": (),
                "elliptic_classes": (),
                "recommended_configuration": name,
                "recommended_method": "supervised",
            },
            "why": {},
        }
    )


def write_tiny_run(
    folder: Path,
    folds: Mapping[str, float | None] | Sequence[str] = ("0",),
    plans: Plans | None = None,
    file_ending: str = ".nii.gz",
    **spec: Any,
) -> Path:
    """A run with finished folds; a number in place of None makes a fold that says `constant_network` everywhere.

    The labels are background 0, organ 1 and tumor 5.
    """
    plans = plans or tiny_plans()
    (configuration,) = plans.configurations
    plan = plans.configurations[configuration]
    values: dict[str, Any] = {
        "dataset": DATASET,
        "split": "default",
        "configuration": configuration,
        "preset": plans.preset,
        "method": "supervised",
        "seed": 0,
        "plans_hash": plans.hash(),
        "total_steps": 10,
    }
    write_json(folder / "run.json", RunSpec(**values | spec).model_dump(mode="json"))
    write_plans(folder / "plans.json", plans)
    description = {
        "channel_names": {str(c): "MR" for c in range(plan.n_channels)},
        "labels": {"background": 0, "organ": 1, "tumor": 5},
        "file_ending": file_ending,
    }
    write_json(folder / "dataset.json", description)
    constants = folds if isinstance(folds, Mapping) else dict.fromkeys(folds)
    prediction = PredictionSpec(members=(Member(name="student", architecture=plan.architecture),))
    for seed, (fold, constant) in enumerate(constants.items()):
        network = build_network(plan.architecture, plan.n_channels, 3, seed=seed)
        if constant is not None:
            make_constant(network, int(constant))
        content = {"format": FORMAT, "networks": {"student": network.state_dict()}, "prediction": prediction.to_json()}
        (folder / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def make_constant(network: nn.Module, output: int, logit: float = 20.0) -> None:
    """The network gives `logit` for one output and 0 for the others, whatever it sees."""
    decoder: Any = network.decoder
    with torch.no_grad():
        for layer in decoder.seg_layers:
            layer.weight.zero_()
            layer.bias.zero_()
            layer.bias[output] = logit


def write_tiny_images(
    folder: Path, cases: Sequence[str], n_channels: int = 1, shape: tuple[int, int, int] = (10, 9, 12)
) -> Path:
    """NIfTI files CASE_0000.nii.gz … with a rotated grid; every image differs."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases):
        generator = np.random.default_rng(number)
        for channel in range(n_channels):
            image = sitk.GetImageFromArray(generator.normal(100, 20, shape).astype(np.float32))
            image.SetSpacing((0.8, 1.0, 1.5))
            image.SetOrigin((-12.5, 30.0, 4.0))
            image.SetDirection((0, -1, 0, 1, 0, 0, 0, 0, 1))
            sitk.WriteImage(image, str(folder / f"{case}_{channel:04d}.nii.gz"))
    return folder


def write_tiny_pictures(folder: Path, cases: Sequence[str], shape: tuple[int, int] = (20, 13)) -> Path:
    """Grey PNG files CASE.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases):
        pixels = np.random.default_rng(number).integers(0, 255, shape).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{case}.png")
    return folder
