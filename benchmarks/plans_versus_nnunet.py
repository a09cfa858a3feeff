"""Compares our plans with those of the real nnU-Net v2 planner, field by field.

    python benchmarks/plans_versus_nnunet.py --nnunet_python ENV/bin/python [--random 300] [--presets plain resenc_m]
        [--real FOLDER [--raw FOLDER]] [-o plans_versus_nnunet.json]

ENV is an environment in which nnunetv2 is installed; it is only called through its interpreter, with JSON in between:
this file is its own worker there. Random fingerprints cover CT and MR, isotropic and anisotropic, tiny and large,
2D, and several channels. FOLDER holds nnU-Net's preprocessed folders (DatasetXXX_Name/{dataset.json,
dataset_fingerprint.json}), whose fingerprints are fed to both planners. With --raw, the folder of the same raw data
sets, ours are planned from our own fingerprints as well; there, means and standard deviations of intensities may differ
by the rounding of nnU-Net's float32 sums, relative 1e-6. None of these data sets has unlabeled cases, so that the batch
size, whose cap counts them, can be compared too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

PLANNERS = {
    "plain": ("ExperimentPlanner", "nnUNetPlans", 8),
    "resenc_m": ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans", 8),
    "resenc_l": ("nnUNetPlannerResEncL", "nnUNetResEncUNetLPlans", 24),
    "resenc_xl": ("nnUNetPlannerResEncXL", "nnUNetResEncUNetXLPlans", 40),
}


# ------------------------------------------------------------------------------------------ in nnU-Net's interpreter


def run_worker(task_file: Path, answer_file: Path) -> None:
    """Plans every data set of the task with nnU-Net's own planners; written as a list of plans by preset."""
    import contextlib
    import io

    root = Path(tempfile.mkdtemp(prefix="nnunet_"))
    for name in ("raw", "preprocessed", "results"):
        (root / name).mkdir()
        os.environ[f"nnUNet_{name}"] = str(root / name)
    os.environ.setdefault("nnUNet_n_proc_DA", "2")
    import torch
    from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as default
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as resenc

    task = json.loads(task_file.read_text())
    if task["on_meta_device"]:  # the same network and the same counting, without allocating weights
        build = default.get_network_from_plans

        def build_on_meta(*arguments: Any, **keywords: Any) -> Any:
            with torch.device("meta"):
                return build(*arguments, **keywords)

        default.get_network_from_plans = build_on_meta
    answers = []
    for index, dataset in enumerate(task["datasets"]):
        name = f"Dataset{index + 1:03d}_Benchmark"
        _write_fake_dataset(root, name, dataset)
        plans, seconds = {}, {}
        for preset in task["presets"]:
            planner_name, plans_name, gpu_memory_gb = PLANNERS[preset]
            planner = getattr(default if preset == "plain" else resenc, planner_name)
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                made = planner(
                    name,
                    gpu_memory_target_in_gb=dataset.get("gpu_memory_gb") or gpu_memory_gb,
                    plans_name=plans_name,
                    overwrite_target_spacing=dataset.get("overwrite_target_spacing"),
                ).plan_experiment()
            seconds[preset] = time.perf_counter() - start
            plans[preset] = json.loads(json.dumps(made, default=_plain)) | {"dataset_name": dataset["name"]}
        answers.append({"plans": plans, "seconds": seconds})
    answer_file.write_text(json.dumps(answers))


def _write_fake_dataset(root: Path, name: str, dataset: dict[str, Any]) -> None:
    """A raw folder of empty files: the planner counts and names images; with a named reader it does not open them."""
    raw, preprocessed = root / "raw" / name, root / "preprocessed" / name
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    description, ending = dataset["description"], dataset["description"]["file_ending"]
    for case in range(description["numTraining"]):
        for channel in range(len(description["channel_names"])):
            (raw / "imagesTr" / f"case_{case:04d}_{channel:04d}{ending}").touch()
        (raw / "labelsTr" / f"case_{case:04d}{ending}").touch()
    (raw / "dataset.json").write_text(json.dumps(description))
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(dataset["fingerprint"]))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value.item()


# --------------------------------------------------------------------------------------------------- in our interpreter


def random_dataset(seed: int) -> dict[str, Any]:
    """A made-up data set: dataset.json and nnU-Net's fingerprint, as plain values."""
    import numpy as np

    random = np.random.default_rng(seed)
    kind = ["isotropic", "anisotropic", "large", "tiny", "flat", "picture", "odd"][seed % 7]
    smallest, largest, thickness = {
        "isotropic": ((60, 60, 60), (220, 260, 260), (0.9, 1.3)),
        "anisotropic": ((8, 180, 180), (60, 560, 560), (2.5, 12)),
        "large": ((200, 400, 400), (900, 700, 700), (0.8, 4)),
        "tiny": ((14, 14, 14), (48, 56, 48), (0.8, 2.5)),
        "flat": ((2, 60, 60), (14, 320, 320), (3, 10)),
        "picture": ((1, 48, 48), (1, 1800, 1800), (1, 1)),
        "odd": ((5, 20, 20), (300, 900, 900), (0.2, 15)),
    }[kind]
    n_cases = int(random.integers(2, 80))
    in_plane, size = (
        random.uniform(0.3, 2.0),
        np.array([random.integers(a, b + 1) for a, b in zip(smallest, largest, strict=True)]),
    )
    center = np.array([in_plane * random.uniform(*thickness), in_plane, in_plane])
    spread = 0.0 if random.random() < 0.3 else random.uniform(0, 0.3)
    order = random.permutation(3) if kind not in ("picture", "flat") else np.arange(3)
    spacings = (
        center * np.exp(random.normal(0, spread, (n_cases, 3))) if kind != "picture" else [[999.0, 1.0, 1.0]] * n_cases
    )
    shapes = np.maximum(np.round(size * np.exp(random.normal(0, spread, (n_cases, 3)))), 1).astype(int)
    if kind == "picture":
        shapes[:, 0] = 1
    n_channels, n_labels = int(random.choice([1, 1, 1, 2, 4])), int(random.choice([1, 2, 3, 14, 60]))
    names = [
        str(random.choice(["CT", "ct", "T1", "FLAIR", "noNorm", "rescale_to_0_1", "zscore"])) for _ in range(n_channels)
    ]
    labels = {"background": 0} | {f"organ_{label}": label for label in range(1, n_labels + 1)}
    if random.random() < 0.1:
        labels["ignore"] = n_labels + 1
    keys = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
    intensities = {str(c): {key: float(abs(random.normal(50, 30))) for key in keys} for c in range(n_channels)}
    ending = ".png" if kind == "picture" else ".nii.gz"
    reader = "NaturalImage2DIO" if kind == "picture" else "NibabelIOWithReorient"
    return {
        "name": f"Dataset{seed % 1000:03d}_{kind}",
        "description": {
            "channel_names": {str(c): name for c, name in enumerate(names)},
            "labels": labels,
            "numTraining": n_cases,
            "file_ending": ending,
            "overwrite_image_reader_writer": reader,
        },
        "fingerprint": {
            "spacings": [[float(v) for v in np.asarray(row)[order]] for row in spacings],
            "shapes_after_crop": [[int(v) for v in row[order]] for row in shapes],
            "median_relative_size_after_cropping": float(random.uniform(0.3, 1)),
            "foreground_intensity_properties_per_channel": intensities,
        },
        "gpu_memory_gb": float(random.choice([4, 11, 24])) if random.random() < 0.1 else None,
        "overwrite_target_spacing": (
            [float(v) for v in random.uniform(0.5, 4, 3)] if random.random() < 0.1 and kind != "picture" else None
        ),
    }


def real_dataset(folder: Path) -> dict[str, Any]:
    """A data set that nnU-Net has already read."""
    fingerprint = json.loads((folder / "dataset_fingerprint.json").read_text())
    description = json.loads((folder / "dataset.json").read_text())
    picture = description["file_ending"] == ".png"
    description |= {"overwrite_image_reader_writer": "NaturalImage2DIO" if picture else "NibabelIOWithReorient"}
    return {"name": folder.name, "description": description, "fingerprint": fingerprint}


def our_plans(dataset: dict[str, Any], preset: str) -> dict[str, Any]:
    """Our plans of the same fingerprint, in nnU-Net's form."""
    from autossl.data.image_io import orientation_for
    from autossl.data.labels import LabelSchema
    from autossl.planners.facts import DatasetFacts
    from autossl.planners.plan_experiment import PlanOptions, plan_from_facts
    from autossl.planners.plans import IntensityProperties

    description, fingerprint = dataset["description"], dataset["fingerprint"]
    facts = DatasetFacts(
        dataset_name=dataset["name"],
        channel_names=tuple(description["channel_names"].values()),
        schema=LabelSchema({name: (value,) for name, value in description["labels"].items()}),
        orientation=orientation_for(description["file_ending"]),
        file_ending=description["file_ending"],
        spacings_zyx_mm=tuple(tuple(row) for row in fingerprint["spacings"]),
        shapes_zyx=tuple(tuple(row) for row in fingerprint["shapes_after_crop"]),
        n_unlabeled=0,
        n_labeled_patients=description["numTraining"],
        median_relative_size_after_crop=fingerprint["median_relative_size_after_cropping"],
        intensities={
            key: IntensityProperties.model_validate(value)
            for key, value in fingerprint["foreground_intensity_properties_per_channel"].items()
        },
    )
    overwritten = dataset.get("overwrite_target_spacing")
    options = PlanOptions(
        preset=preset,
        gpu_memory_gb=dataset.get("gpu_memory_gb"),
        overwrite_target_spacing=tuple(overwritten) if overwritten else None,
    )
    return plan_from_facts(facts, options).to_nnunet_json()


def plans_from_raw(folder: Path, preset: str) -> dict[str, Any]:
    """Our plans of a raw data set, from our own fingerprint, in nnU-Net's form."""
    from autossl.planners.plan_and_preprocess import PlanRequest, plan_and_preprocess
    from autossl.planners.plan_experiment import PlanOptions

    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "raw").mkdir()
        (Path(root) / "raw" / folder.name).symlink_to(folder.absolute())
        plans = plan_and_preprocess(
            PlanRequest(folder.name, Path(root), PlanOptions(preset=preset), preprocess=False)
        ).plans
    return dict(json.loads(json.dumps(plans.to_nnunet_json())))


def differences(ours: Any, theirs: Any, path: str = "", relative: float = 0.0) -> list[str]:
    """Paths at which two JSON values differ. Numbers are compared exactly, means and deviations by `relative`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            fault
            for key in [*theirs, *(key for key in ours if key not in theirs)]
            for fault in (
                differences(ours[key], theirs[key], f"{path}.{key}".lstrip("."), relative)
                if key in ours and key in theirs
                else [f"{path}.{key} is only {'ours' if key in ours else 'theirs'}"]
            )
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [fault for i, (a, b) in pairs for fault in differences(a, b, f"{path}.{i}", relative)]
    if path.endswith((".mean", ".std")) and isinstance(ours, float):
        return [] if abs(ours - theirs) <= relative * abs(theirs) else [f"{path}: ours {ours}, theirs {theirs}"]
    return [] if ours == theirs else [f"{path}: ours {ours}, theirs {theirs}"]


def count_fields(value: Any) -> int:
    """Leaves of a JSON value."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 1 if children is None else sum(count_fields(child) for child in children)


def ask_nnunet(python: Path, task: dict[str, Any], kept: Path | None) -> list[dict[str, Any]]:
    """nnU-Net's plans of the task's data sets, made by its own interpreter, or kept from an equal task."""
    task = json.loads(json.dumps(task))
    if kept is not None and kept.is_file():
        content = json.loads(kept.read_text())
        if content["task"] == task:
            return list(content["answers"])
    with tempfile.TemporaryDirectory() as folder:
        task_file, answer_file = Path(folder) / "task.json", Path(folder) / "answer.json"
        task_file.write_text(json.dumps(task))
        command = [str(python), "-W", "ignore", __file__, "--worker", str(task_file), str(answer_file)]
        subprocess.run(command, check=True)
        answers = list(json.loads(answer_file.read_text()))
    if kept is not None:
        kept.write_text(json.dumps({"task": task, "answers": answers}))
    return answers


def compare(datasets: list[dict[str, Any]], answers: list[dict[str, Any]], presets: list[str]) -> dict[str, Any]:
    """Counts of equal plans, all differences, and the time that each planner took, imports left out."""
    faults: dict[str, list[str]] = {}
    figures: dict[str, dict[str, Any]] = {
        p: {"plans": 0, "equal": 0, "fields": 0, "with_lowres": 0, "ours_s": [], "nnunet_s": []} for p in presets
    }
    for dataset, answer in zip(datasets, answers, strict=True):
        for preset in presets:
            start = time.perf_counter()
            ours = json.loads(json.dumps(our_plans(dataset, preset)))
            figure, theirs = figures[preset], answer["plans"][preset]
            figure["ours_s"].append(time.perf_counter() - start)
            figure["nnunet_s"].append(answer["seconds"][preset])
            found = differences(ours, theirs)
            figure["plans"] += 1
            figure["equal"] += not found
            figure["fields"] += count_fields(theirs)
            figure["with_lowres"] += "3d_lowres" in theirs["configurations"]
            if found:
                faults[f"{dataset['name']} {preset}"] = found
    for figure in figures.values():
        for key in ("ours_s", "nnunet_s"):
            times = figure.pop(key)
            figure[key] = {"mean": sum(times) / len(times), "largest": max(times)} if times else None
    return {"presets": figures, "differences": faults}


def compare_raw(raw: Path, datasets: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Differences per raw data set and preset between plans from our own fingerprint and nnU-Net's."""
    return {
        f"{dataset['name']} {preset}": differences(plans_from_raw(raw / dataset["name"], preset), theirs, relative=1e-6)
        for dataset, answer in zip(datasets, answers, strict=True)
        for preset, theirs in answer["plans"].items()
    }


def about_this_run(nnunet_python: Path) -> dict[str, Any]:
    """Machine, versions and commit."""
    ask_version = "import importlib.metadata as m; print(m.version('nnunetv2'))"
    commands = {
        "commit": ["git", "rev-parse", "HEAD"],
        "nnunetv2": [str(nnunet_python), "-c", ask_version],
    }
    versions = {
        name: subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        for name, command in commands.items()
    }
    return versions | {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} CPUs"}


def main() -> int:
    """Runs the comparison; exit code 1 where any field differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet_python", type=Path, required=True)
    parser.add_argument("--random", type=int, default=300, metavar="N")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--presets", nargs="+", default=["plain", "resenc_m"], choices=list(PLANNERS))
    parser.add_argument("--real", type=Path, help="nnU-Net's preprocessed folder")
    parser.add_argument("--raw", type=Path, help="folder of the same raw data sets")
    parser.add_argument(
        "--allocate", action="store_true", help="let nnU-Net allocate its networks (slow, same numbers)"
    )
    parser.add_argument("--keep_answers", type=Path, help="file to keep nnU-Net's plans in, for the next time")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    datasets = [random_dataset(seed) for seed in range(arguments.first_seed, arguments.first_seed + arguments.random)]
    if arguments.real:
        datasets += [real_dataset(f.parent) for f in sorted(arguments.real.glob("*/dataset_fingerprint.json"))]
    task = {"datasets": datasets, "presets": arguments.presets, "on_meta_device": not arguments.allocate}
    import_module("autossl.planners.plan_experiment")  # a fault here shows before the long part
    answers = ask_nnunet(arguments.nnunet_python, task, arguments.keep_answers)
    result = compare(datasets, answers, arguments.presets)
    if arguments.raw:
        result["from_raw"] = compare_raw(arguments.raw, datasets[arguments.random :], answers[arguments.random :])
    result |= about_this_run(arguments.nnunet_python)
    result |= {"random": arguments.random, "first_seed": arguments.first_seed}
    result |= {"real": [d["name"] for d in datasets[arguments.random :]]}
    text = json.dumps(result, indent=2)
    print(text[:8000])
    if arguments.output:
        arguments.output.write_text(text + "\n")
    return 1 if result["differences"] or any(result.get("from_raw", {}).values()) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        run_worker(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
