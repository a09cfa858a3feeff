"""Runs with random weights, for rows where it does not matter what a network has learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autossl.data.runs import RunSpec
from autossl.inference.checkpoint import FORMAT
from autossl.networks.build import build_network
from autossl.networks.prediction import Member, PredictionSpec
from autossl.planners.plans import NETWORK_CLASSES, Plans, write_plans

CONFIGURATION = "3d_fullres"
INTENSITIES = ("mean", "std", "min", "max", "median", "percentile_00_5", "percentile_99_5")


def plans_3d(
    dataset: str, patch: Sequence[int], features: Sequence[int], spacing: Sequence[float], batch_size: int
) -> Plans:
    """A plan with nnU-Net's plain U-Net, one channel, mirrored over all axes.

    Args:
        dataset: its name.
        patch: voxels z,y,x.
        features: per stage; every stage but the first halves the axes.
        spacing: mm z,y,x.
        batch_size: of labeled patches.
    """
    n = len(features)
    kwargs = {
        "n_stages": n,
        "features_per_stage": list(features),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * n,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (n - 1),
        "n_conv_per_stage": [2] * n,
        "n_conv_per_stage_decoder": [2] * (n - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = {
        "data_identifier": f"nnUNetPlans_{CONFIGURATION}",
        "batch_size": batch_size,
        "patch_size": list(patch),
        "median_image_size_in_voxels": list(patch),
        "spacing": list(spacing),
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": {
            "network_class_name": NETWORK_CLASSES["plain"],
            "arch_kwargs": kwargs,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
        "mirror_axes": [0, 1, 2],
        "labeled_batch_size": batch_size,
        "unlabeled_batch_size": batch_size,
    }
    return Plans.model_validate(
        {
            "dataset_name": dataset,
            "plans_name": "nnUNetPlans",
            "preset": "plain",
            "orientation": "RAS",
            "image_reader_writer": "NibabelIOWithReorient",
            "original_median_spacing_after_transp": list(spacing),
            "original_median_shape_after_transp": list(patch),
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {CONFIGURATION: configuration},
            "experiment_planner_used": "ExperimentPlanner",
            "foreground_intensity_properties_per_channel": {"0": dict.fromkeys(INTENSITIES, 1.0)},
            "semi_supervised": {
                "total_steps": 1,
                "warm_up_fraction": 0,
                "ramp_end_fraction": 0,
                "ema_decay_max": 0,
                "single_component_classes": [],
                "elliptic_classes": [],
                "recommended_configuration": CONFIGURATION,
                "recommended_method": "supervised",
            },
            "why": {},
        }
    )


def write_random_run(folder: Path, plans: Plans, labels: Mapping[str, int]) -> Path:
    """A run of one fold; gives its folder.

    Args:
        folder: to make.
        plans: of the run.
        labels: names and values of dataset.json, background included.
    """
    plan = plans.configurations[CONFIGURATION]
    folder.mkdir(parents=True)
    description: dict[str, Any] = {"channel_names": {"0": "MRI"}, "labels": dict(labels), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description | {"numTraining": 1}))
    write_plans(folder / "plans.json", plans)
    run = RunSpec(
        dataset=plans.dataset_name,
        split="default",
        configuration=CONFIGURATION,
        preset=plans.preset,
        method="supervised",
        seed=0,
        plans_hash=plans.hash(),
        total_steps=1,
    )
    (folder / "run.json").write_text(json.dumps(run.model_dump(mode="json")))
    spec = PredictionSpec(members=(Member(name="student", architecture=plan.architecture),))
    network = build_network(plan.architecture, plan.n_channels, len(labels), seed=0)
    (folder / "fold_0").mkdir()
    content = {"format": FORMAT, "networks": {"student": network.state_dict()}, "prediction": spec.to_json()}
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    return folder
