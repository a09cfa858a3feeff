"""Predicts the same images with the real nnUNetv2_predict and with autossl_predict, same network, same weights.

    python benchmarks/predict_versus_nnunet.py --nnunet ENV --images FOLDER [--run FOLDER] [--cases 26] [--folds 1]
        [--mirroring] [--explain] [--repeats 2] [-o predict_versus_nnunet.json]

ENV is an environment with nnunetv2 2.8.1 (its bin/ holds nnUNetv2_predict). Without --run the images are those of
Dataset004_Hippocampus, the network is nnU-Net's own 3d_fullres plan for it, and the weights are random: the harder test
of equality, because many voxels are near ties. --run names a trained run of autossl (of a method that deploys one
network), the images are of its data set. Both programs run as their users run them, each in its own process, start and
imports included, on the CPU with their own choice of threads, in turn. nnU-Net is given the least that it accepts as
a model folder. What still differs comes from nnU-Net's sums in half precision (ours are float32), coarse where Gaussian
weights are nearly 0: with --explain nnU-Net's own predictor runs once more with float32 in place of half precision, and
its label maps are compared as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autossl.data.case_files import case_files
from autossl.data.image_io import read_label
from autossl.data.runs import RunSpec
from autossl.inference.checkpoint import FORMAT, read_trained_networks
from autossl.inference.model_folder import TrainedModel, read_model
from autossl.networks.build import build_network
from autossl.networks.prediction import Member, PredictionSpec
from autossl.planners.plans import NETWORK_CLASSES, Plans, write_plans
from autossl.version import __version__

DATASET = "Dataset004_Hippocampus"
CONFIGURATION = "3d_fullres"
LABELS = {"background": 0, "Anterior": 1, "Posterior": 2}


FLOAT32_CODE = """
import sys, torch
from pathlib import Path
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
images, output, model, folds, mirroring = sys.argv[1:]
torch.half = torch.float32  # nnU-Net's name for the type of its sums
predictor = nnUNetPredictor(use_mirroring=mirroring == "True", device=torch.device("cpu"),
                            perform_everything_on_device=False, allow_tqdm=False)
predictor.initialize_from_trained_model_folder(model, folds.split(","), "checkpoint_final.pth")
Path(output).mkdir()
predictor.predict_from_files_sequential(images, output)
"""


def hippocampus_plans() -> Plans:
    """nnU-Net 2.8.1's 3d_fullres plan of the data set."""
    architecture = {
        "network_class_name": NETWORK_CLASSES["plain"],
        "arch_kwargs": {
            "n_stages": 4,
            "features_per_stage": [32, 64, 128, 256],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 4,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * 3,
            "n_conv_per_stage": [2, 2, 2, 2],
            "n_conv_per_stage_decoder": [2, 2, 2],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "batch_size": 9,
        "patch_size": [40, 56, 40],
        "median_image_size_in_voxels": [36.0, 50.0, 35.0],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": architecture,
        "batch_dice": False,
        "mirror_axes": [0, 1, 2],
        "labeled_batch_size": 9,
        "unlabeled_batch_size": 9,
    }
    names = ("mean", "std", "min", "max", "median", "percentile_00_5", "percentile_99_5")
    decisions = {"total_steps": 1, "warm_up_fraction": 0, "ramp_end_fraction": 0, "ema_decay_max": 0}
    return Plans.model_validate(
        {
            "dataset_name": DATASET,
            "plans_name": "nnUNetPlans",
            "preset": "plain",
            "orientation": "RAS",
            "image_reader_writer": "NibabelIOWithReorient",
            "original_median_spacing_after_transp": [1, 1, 1],
            "original_median_shape_after_transp": [36, 50, 35],
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {CONFIGURATION: configuration},
            "experiment_planner_used": "ExperimentPlanner",
            "foreground_intensity_properties_per_channel": {"0": dict.fromkeys(names, 1.0)},
            "semi_supervised": decisions
            | {
                "single_component_classes": [],
                "elliptic_classes": [],
                "recommended_configuration": CONFIGURATION,
                "recommended_method": "supervised",
            },
            "why": {},
        }
    )


def write_random_run(folder: Path, folds: int) -> None:
    """A run of ours with the hippocampus plan and random weights."""
    plans = hippocampus_plans()
    plan = plans.configurations[CONFIGURATION]
    folder.mkdir(parents=True)
    description = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": 260, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))
    write_plans(folder / "plans.json", plans)
    run = RunSpec(
        dataset=plans.dataset_name,
        split="default",
        configuration=CONFIGURATION,
        preset="plain",
        method="supervised",
        seed=0,
        plans_hash=plans.hash(),
        total_steps=1,
    )
    (folder / "run.json").write_text(json.dumps(run.model_dump(mode="json")))
    spec = PredictionSpec(members=(Member(name="student", architecture=plan.architecture),))
    for fold in range(folds):
        network = build_network(plan.architecture, plan.n_channels, len(LABELS), seed=fold)
        (folder / f"fold_{fold}").mkdir()
        content = {"format": FORMAT, "networks": {"student": network.state_dict()}, "prediction": spec.to_json()}
        torch.save(content, folder / f"fold_{fold}" / "checkpoint_final.pth")


def write_nnunet_folder(model: TrainedModel, results: Path) -> Path:
    """The least that nnU-Net accepts, in its folder of results; gives the model's own folder."""
    folder = results / model.run.dataset / f"nnUNetTrainer__nnUNetPlans__{model.run.configuration}"
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(model.description.to_json() | {"numTraining": 1}))
    write_plans(folder / "plans.json", model.plans)
    for fold in model.folds:
        (weights,) = read_trained_networks(model.checkpoint(fold)).networks.values()
        (folder / f"fold_{fold}").mkdir()
        content = {
            "network_weights": weights,
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": model.run.configuration},
            "inference_allowed_mirroring_axes": model.plan.mirror_axes or None,  # it fails at an empty one
        }
        torch.save(content, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def copy_images(source: Path, target: Path, model: TrainedModel, n: int) -> None:
    """The first n cases by name, with channel numbers in their names."""
    target.mkdir()
    ending = model.description.file_ending
    cases = list(case_files(source, ending, model.plan.n_channels).items())[:n]
    for case, files in cases:
        for channel, path in enumerate(files):
            shutil.copy(path, target / f"{case}_{channel:04d}{ending}")


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def agreement(ours: Path, theirs: Path, ending: str) -> dict[str, Any]:
    """Equal voxels over all cases, and the case with the most that differ; the grids must be the same."""
    equal = total = 0
    worst = 1.0
    foreground = 0
    for path in sorted(theirs.glob(f"*{ending}")):
        reference, spacing, _ = read_label(path)
        predicted, own_spacing, _ = read_label(ours / path.name)
        if predicted.shape != reference.shape or not np.allclose(spacing, own_spacing):
            raise SystemExit(f"{path.name}: another grid than nnU-Net's")
        same = int((predicted == reference).sum())
        equal, total, worst = equal + same, total + reference.size, min(worst, same / reference.size)
        foreground += int((reference > 0).sum())
    return {
        "voxels": total,
        "voxels_that_differ": total - equal,
        "share_equal": equal / total,
        "share_equal_worst_case": worst,
        "share_foreground": foreground / total,
    }


def commit() -> str:
    """Of the repository that this file lies in."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet", type=Path, required=True, metavar="ENV")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--cases", type=int, default=26)
    parser.add_argument("--run", type=Path, metavar="FOLDER")
    parser.add_argument("--folds", type=int, default=1, help="of the random weights; of a run: the first ones")
    parser.add_argument("--mirroring", action="store_true")
    parser.add_argument("--explain", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    result = _measure(arguments)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if arguments.run is None:
            write_random_run(root / "ours", arguments.folds)
        model = read_model(arguments.run or root / "ours")
        model = replace(model, folds=model.folds[: arguments.folds])
        nnunet_folder = write_nnunet_folder(model, root / "results")
        copy_images(arguments.images, root / "images", model, arguments.cases)
        for folder in ("raw", "preprocessed", "results"):
            environment[f"nnUNet_{folder}"] = str(root / folder)
        places = ["-i", str(root / "images"), "-o"]
        command = [str(Path(sys.executable).with_name("autossl_predict")), "-q", *places, str(root / "out_ours")]
        command += ["--model", str(model.folder), "-f", *model.folds, "--device", "cpu", "--overwrite"]
        command += [] if arguments.mirroring else ["--no_mirroring"]
        reference = [str(arguments.nnunet / "bin" / "nnUNetv2_predict"), *places, str(root / "out_theirs")]
        reference += ["-d", model.run.dataset, "-c", model.run.configuration, "-f", *model.folds, "-device", "cpu"]
        reference += ["--disable_progress_bar", *([] if arguments.mirroring else ["--disable_tta"])]
        for _ in range(arguments.repeats):
            theirs.append(timed(reference, environment))
            ours.append(timed(command, environment))
        ending = model.description.file_ending
        equal = {"as_it_is": agreement(root / "out_ours", root / "out_theirs", ending)}
        if arguments.explain:
            inner = [str(arguments.nnunet / "bin" / "python"), "-c", FLOAT32_CODE, str(root / "images")]
            inner += [str(root / "out_float32"), str(nnunet_folder), ",".join(model.folds), str(arguments.mirroring)]
            timed(inner, environment)
            equal["nnunet_in_float32"] = agreement(root / "out_ours", root / "out_float32", ending)
    return {
        "what": f"{arguments.cases} cases, {len(model.folds)} folds, mirroring {arguments.mirroring}, whole commands",
        "model": f"{model.run.dataset} {model.run.configuration} {model.run.preset}",
        "weights": "trained" if arguments.run else "random",
        "ours_wall_s": [round(wall, 2) for wall, _ in ours],
        "nnunet_wall_s": [round(wall, 2) for wall, _ in theirs],
        "ours_cpu_s": [round(cpu, 2) for _, cpu in ours],
        "nnunet_cpu_s": [round(cpu, 2) for _, cpu in theirs],
        "ratio_of_best_wall": round(min(ours)[0] / min(theirs)[0], 3),
        "target": "at most 0.5 for 26 hippocampus cases, one fold, no mirroring",
        "agreement": equal,
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {"autossl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
    }


if __name__ == "__main__":
    main()
