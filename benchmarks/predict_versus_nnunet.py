"""Predicts hippocampus cases with the real nnUNetv2_predict and with autossl_predict, same network, same weights.

    python benchmarks/predict_versus_nnunet.py --nnunet ENV --images FOLDER [--cases 26] [--mirroring] [--folds 1]
        [--repeats 2] [--checkpoint FILE] [-o predict_versus_nnunet.json]

ENV is an environment with nnunetv2 2.8.1 (its bin/ holds nnUNetv2_predict); FOLDER holds Dataset004_Hippocampus's
images. The network is nnU-Net's 3d_fullres plan for that data set. Its weights are random unless --checkpoint names
one of autossl's with that network; random weights are the harder test of equality, because many voxels are near ties.
What still differs comes from nnU-Net's sums in half precision (ours are float32): with one fold and no mirroring, cases
of a single tile are predicted once more here and rounded as nnU-Net rounds, and what then differs is counted.
Both programs run as their users run them, each in its own process, start and imports included, on the CPU with their
own choice of threads, in turn. For nnU-Net the minimal model folder that it accepts is written.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autossl.data.image_io import read_image, read_label
from autossl.data.runs import RunSpec
from autossl.inference.checkpoint import FORMAT, read_trained_networks
from autossl.inference.model_folder import read_model
from autossl.inference.predictor import Window
from autossl.inference.tiles import tile_weights
from autossl.networks.build import build_network
from autossl.networks.prediction import Member, PredictionSpec
from autossl.planners.plans import NETWORK_CLASSES, Plans, write_plans
from autossl.preprocessing.prepare import prepare_case
from autossl.version import __version__

DATASET = "Dataset004_Hippocampus"
LABELS = {"background": 0, "Anterior": 1, "Posterior": 2}
ENDING = ".nii.gz"


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
            "configurations": {"3d_fullres": configuration},
            "experiment_planner_used": "ExperimentPlanner",
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


def write_models(root: Path, plans: Plans, folds: int, checkpoint: Path | None) -> None:
    """The same weights as a run of ours, and as the least that nnU-Net accepts."""
    plan = plans.configurations["3d_fullres"]
    description = {
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": 260,
        "file_ending": ENDING,
    }
    ours = root / "ours"
    theirs = root / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    for folder in (ours, theirs):
        folder.mkdir(parents=True)
        (folder / "dataset.json").write_text(json.dumps(description))
        write_plans(folder / "plans.json", plans)
    run = RunSpec(
        dataset=DATASET,
        split="default",
        configuration="3d_fullres",
        preset="plain",
        method="supervised",
        seed=0,
        plans_hash=plans.hash(),
        total_steps=1,
    )
    (ours / "run.json").write_text(json.dumps(run.model_dump(mode="json")))
    spec = PredictionSpec(members=(Member(name="student", architecture=plan.architecture),))
    for fold in range(folds):
        weights = _weights(plans, fold, checkpoint)
        for folder in (ours, theirs):
            (folder / f"fold_{fold}").mkdir()
        content = {"format": FORMAT, "networks": {"student": weights}, "prediction": spec.to_json()}
        torch.save(content, ours / f"fold_{fold}" / "checkpoint_final.pth")
        content = {
            "network_weights": weights,
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": "3d_fullres"},
            "inference_allowed_mirroring_axes": plan.mirror_axes,
        }
        torch.save(content, theirs / f"fold_{fold}" / "checkpoint_final.pth")


def _weights(plans: Plans, seed: int, checkpoint: Path | None) -> dict[str, Tensor]:
    if checkpoint is not None:
        (weights,) = read_trained_networks(checkpoint).networks.values()
        return dict(weights)
    plan = plans.configurations["3d_fullres"]
    return dict(build_network(plan.architecture, 1, len(LABELS), seed=seed).state_dict())


def copy_images(source: Path, target: Path, n: int) -> None:
    """The first n cases by name, with channel numbers in their names."""
    target.mkdir()
    files = sorted(path for path in source.iterdir() if path.name.endswith(ENDING))[:n]
    if len(files) < n:
        raise SystemExit(f"{source} holds {len(files)} images, {n} were asked for")
    for path in files:
        stem = path.name.removesuffix(ENDING)
        shutil.copy(path, target / f"{stem if stem.endswith('_0000') else stem + '_0000'}{ENDING}")


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


def agreement(ours: Path, theirs: Path) -> dict[str, Any]:
    """Equal voxels over all cases, and the case with the most that differ; geometry is compared through RAS arrays."""
    equal = total = 0
    worst = 1.0
    foreground = 0
    for path in sorted(theirs.glob(f"*{ENDING}")):
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


def differing_after_rounding(root: Path) -> dict[str, int]:
    """Voxels of single-tile cases that differ from nnU-Net's, as they are and with logits rounded as nnU-Net does."""
    model = read_model(root / "ours")
    predictor = model.load_predictor(Window.of(model.plan, mirror=False))
    weights = torch.from_numpy(tile_weights(model.plan.patch_size).copy())
    counts = {"voxels": 0, "differ_in_float32": 0, "differ_rounded_as_nnunet": 0}
    for path in sorted((root / "images").iterdir()):
        prepared = prepare_case(read_image([path]), None, model.plans, "3d_fullres")
        shape = prepared.image.shape[1:]
        if any(n > edge for n, edge in zip(shape, weights.shape, strict=True)):
            continue
        z, y, x = (slice((edge - n) // 2, (edge - n) // 2 + n) for n, edge in zip(shape, weights.shape, strict=True))
        logits = predictor.logits(prepared.image)
        rounded = (logits * weights[z, y, x]).half() / weights[z, y, x].half()
        label, _, _ = read_label(root / "out_theirs" / path.name.replace("_0000", ""))
        reference = torch.from_numpy(label.astype(np.int64))
        counts["voxels"] += reference.numel()
        counts["differ_in_float32"] += int((logits.argmax(0) != reference).sum())
        counts["differ_rounded_as_nnunet"] += int((rounded.argmax(0) != reference).sum())
    return counts


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
    parser.add_argument("--folds", type=int, default=1)
    parser.add_argument("--mirroring", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE")
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
        copy_images(arguments.images, root / "images", arguments.cases)
        write_models(root, hippocampus_plans(), arguments.folds, arguments.checkpoint)
        for folder in ("raw", "preprocessed", "results"):
            environment[f"nnUNet_{folder}"] = str(root / folder)
        folds = [str(fold) for fold in range(arguments.folds)]
        command = [str(Path(sys.executable).with_name("autossl_predict")), "-i", str(root / "images"), "-q"]
        command += ["-o", str(root / "out_ours"), "--model", str(root / "ours"), "--device", "cpu", "--overwrite"]
        command += [] if arguments.mirroring else ["--no_mirroring"]
        reference = [str(arguments.nnunet / "bin" / "nnUNetv2_predict"), "-i", str(root / "images"), "-d", DATASET]
        reference += ["-o", str(root / "out_theirs"), "-c", "3d_fullres", "-f", *folds, "-device", "cpu"]
        reference += ["--disable_progress_bar", *([] if arguments.mirroring else ["--disable_tta"])]
        for _ in range(arguments.repeats):
            theirs.append(timed(reference, environment))
            ours.append(timed(command, environment))
        equal = agreement(root / "out_ours", root / "out_theirs")
        if arguments.folds == 1 and not arguments.mirroring:
            equal["single_tile_cases"] = differing_after_rounding(root)
    return {
        "what": f"{arguments.cases} cases, {arguments.folds} folds, mirroring {arguments.mirroring}, whole commands",
        "weights": str(arguments.checkpoint.name) if arguments.checkpoint else "random",
        "ours_wall_s": [round(wall, 2) for wall, _ in ours],
        "nnunet_wall_s": [round(wall, 2) for wall, _ in theirs],
        "ours_cpu_s": [round(cpu, 2) for _, cpu in ours],
        "nnunet_cpu_s": [round(cpu, 2) for _, cpu in theirs],
        "ratio_of_best_wall": round(min(ours)[0] / min(theirs)[0], 3),
        "target": "at most 0.5",
        "agreement": equal,
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {"autossl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
    }


if __name__ == "__main__":
    main()
