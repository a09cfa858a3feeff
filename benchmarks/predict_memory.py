"""Peak memory of predicting one large volume with few and with many classes.

    python benchmarks/predict_memory.py [--shape 400 512 512] [--classes 2 15] [--spacing 1.0] [--step_size 0.5]
        [-o predict_memory.json]

A noise volume (z,y,x) with 1 mm voxels is written as NIfTI and predicted with random weights of a nano 3D network
(patch 48 cubed, 8 base features), reading and writing included, each in its own process. --spacing is the plan's target
spacing: other than 1.0 the image is resampled on the way in and the logits on the way back. Classes include background.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from autossl.data.runs import RunSpec
from autossl.inference.checkpoint import FORMAT
from autossl.networks.build import build_network
from autossl.networks.prediction import Member, PredictionSpec
from autossl.planners.plans import NETWORK_CLASSES, Plans, write_plans
from autossl.version import __version__

DATASET = "Dataset900_Large"
PEAK_CODE = """
import resource, sys
from pathlib import Path
from autossl.inference.predict import PredictRequest, predict
images, output, model, step = sys.argv[1:]
predict(PredictRequest(input=Path(images), output=Path(output), model=Path(model), device="cpu", mirroring=False,
                       step_size=float(step)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def nano_plans(spacing: float) -> Plans:
    """A nano 3D plan: patch 48 cubed, features 8 to 128."""
    architecture = {
        "network_class_name": NETWORK_CLASSES["plain"],
        "arch_kwargs": {
            "n_stages": 5,
            "features_per_stage": [8, 16, 32, 64, 128],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 5,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * 4,
            "n_conv_per_stage": [2] * 5,
            "n_conv_per_stage_decoder": [2] * 4,
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
    }
    configuration = {
        "data_identifier": "large",
        "batch_size": 2,
        "patch_size": [48] * 3,
        "median_image_size_in_voxels": [400, 512, 512],
        "spacing": [spacing] * 3,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": architecture,
        "batch_dice": False,
        "mirror_axes": [0, 1, 2],
        "labeled_batch_size": 2,
        "unlabeled_batch_size": 2,
    }
    names = ("mean", "std", "min", "max", "median", "percentile_00_5", "percentile_99_5")
    decisions = {"total_steps": 1, "warm_up_fraction": 0, "ramp_end_fraction": 0, "ema_decay_max": 0}
    return Plans.model_validate(
        {
            "dataset_name": DATASET,
            "plans_name": "plans_nano",
            "preset": "nano",
            "orientation": "RAS",
            "image_reader_writer": "NibabelIOWithReorient",
            "original_median_spacing_after_transp": [1, 1, 1],
            "original_median_shape_after_transp": [400, 512, 512],
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {"3d_fullres": configuration},
            "experiment_planner_used": "nano",
            "foreground_intensity_properties_per_channel": {"0": dict.fromkeys(names, 1.0)},
            "semi_supervised": decisions
            | {
                "single_component_classes": [],
                "elliptic_classes": [],
                "recommended_configuration": "3d_fullres",
                "recommended_method": "supervised",
            },
            "why": {},
        }
    )


def write_run(folder: Path, plans: Plans, n_classes: int) -> None:
    """A run of one fold with random weights."""
    plan = plans.configurations["3d_fullres"]
    folder.mkdir()
    labels = {"background": 0} | {f"class_{value}": value for value in range(1, n_classes)}
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))
    write_plans(folder / "plans.json", plans)
    run = RunSpec(
        dataset=DATASET,
        split="default",
        configuration="3d_fullres",
        preset="nano",
        method="supervised",
        seed=0,
        plans_hash=plans.hash(),
        total_steps=1,
    )
    (folder / "run.json").write_text(json.dumps(run.model_dump(mode="json")))
    spec = PredictionSpec(members=(Member(name="student", architecture=plan.architecture),))
    network = build_network(plan.architecture, 1, n_classes, seed=0)
    (folder / "fold_0").mkdir()
    content = {"format": FORMAT, "networks": {"student": network.state_dict()}, "prediction": spec.to_json()}
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")


def write_volume(folder: Path, shape: tuple[int, ...]) -> None:
    """One case of 16-bit noise."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(1, 1000, shape, dtype=np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(noise), str(folder / "large_0000.nii.gz"), True, compressionLevel=1)


def measure(images: Path, root: Path, plans: Plans, n_classes: int, step_size: float) -> dict[str, Any]:
    """Peak resident memory and wall time of predicting the volume."""
    model = root / f"model_{n_classes}"
    write_run(model, plans, n_classes)
    command = [sys.executable, "-c", PEAK_CODE, str(images), str(root / f"out_{n_classes}"), str(model), str(step_size)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    wall = time.perf_counter() - start
    unit = 1 if platform.system() == "Darwin" else 1024
    return {"classes": n_classes, "peak_gb": round(int(done.stdout.split()[-1]) * unit / 1e9, 3), "wall_s": round(wall)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[400, 512, 512], metavar="N")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 15], metavar="N")
    parser.add_argument("--spacing", type=float, default=1.0, metavar="MM")
    parser.add_argument("--step_size", type=float, default=0.5, metavar="S")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_volume(root / "images", tuple(arguments.shape))
        plans = nano_plans(arguments.spacing)
        runs = [measure(root / "images", root, plans, n, arguments.step_size) for n in arguments.classes]
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    peaks = [run["peak_gb"] for run in runs]
    result = {
        "what": f"one volume {arguments.shape}, target spacing {arguments.spacing} mm, step {arguments.step_size}",
        "runs": runs,
        "most_above_least_gb": round(max(peaks) - min(peaks), 3),
        "target": "peak at most 5 GB, at most 1 GB above the 2-class run",
        "machine": {"cpus": os.cpu_count(), "page_bytes": resource.getpagesize()},
        "versions": {"autossl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
