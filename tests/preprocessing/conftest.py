"""Plans and images of a made-up dataset, small enough for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from autossl.data.geometry import Geometry
from autossl.data.image_io import LoadedImage
from autossl.planners.plans import NETWORK_CLASSES, Plans

MakePlans = Callable[..., Plans]
MakeImage = Callable[..., LoadedImage]


def _configuration(dims: int, spacing: tuple[float, ...], schemes: tuple[str, ...], masked: bool) -> dict[str, Any]:
    architecture = {
        "network_class_name": NETWORK_CLASSES["plain"],
        "arch_kwargs": {
            "n_stages": 1,
            "features_per_stage": [4],
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [[3] * dims],
            "strides": [[1] * dims],
            "n_conv_per_stage": [1],
            "n_conv_per_stage_decoder": [],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
    }
    return {
        "data_identifier": f"tests_{dims}d",
        "batch_size": 2,
        "patch_size": [8] * dims,
        "median_image_size_in_voxels": [10] * dims,
        "spacing": spacing,
        "normalization_schemes": schemes,
        "use_mask_for_norm": [masked and scheme == "ZScoreNormalization" for scheme in schemes],
        "architecture": architecture,
        "batch_dice": False,
        "mirror_axes": (0,),
        "labeled_batch_size": 1,
        "unlabeled_batch_size": 1,
    }


@pytest.fixture
def make_plans() -> MakePlans:
    """Plans with a `2d` and a `3d_fullres` configuration."""

    def make(
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
        schemes: tuple[str, ...] = ("ZScoreNormalization",),
        transpose: tuple[int, int, int] = (0, 1, 2),
        masked: bool = False,
    ) -> Plans:
        properties = {"mean": 50.0, "std": 20.0, "min": -5.0, "max": 300.0, "median": 45.0}
        properties |= {"percentile_00_5": 0.0, "percentile_99_5": 90.0}
        return Plans.model_validate(
            {
                "dataset_name": "Dataset900_Tiny",
                "plans_name": "tests",
                "preset": "plain",
                "orientation": "RAS",
                "image_reader_writer": "NibabelIOWithReorient",
                "original_median_spacing_after_transp": (1, 1, 1),
                "original_median_shape_after_transp": (10, 10, 10),
                "transpose_forward": transpose,
                "transpose_backward": [transpose.index(axis) for axis in range(3)],
                "configurations": {
                    "2d": _configuration(2, spacing[1:], schemes, masked),
                    "3d_fullres": _configuration(3, spacing, schemes, masked),
                },
                "experiment_planner_used": "tests",
                "foreground_intensity_properties_per_channel": {str(c): properties for c in range(len(schemes))},
                "semi_supervised": {
                    "total_steps": 10,
                    "warm_up_fraction": 0,
                    "ramp_end_fraction": 0.5,
                    "ema_decay_max": 0.9,
                    "single_component_classes": (),
                    "elliptic_classes": (),
                    "recommended_configuration": "2d",
                    "recommended_method": "mean_teacher",
                },
                "why": {},
            }
        )

    return make


@pytest.fixture
def make_image() -> MakeImage:
    """An image of an array [C,z,y,x], as if it was read from a file."""

    def make(array: Any, spacing_zyx_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> LoadedImage:
        geometry = Geometry(
            kind="sitk",
            size_xyz=tuple(int(n) for n in array.shape[:0:-1]),
            spacing_xyz=spacing_zyx_mm[::-1],
            origin_xyz=(0.0, 0.0, 0.0),
            direction=(1, 0, 0, 0, 1, 0, 0, 0, 1),
            spacing_zyx_mm=spacing_zyx_mm,
        )
        return LoadedImage(np.asarray(array, dtype=np.float32), (geometry,) * len(array))

    return make
