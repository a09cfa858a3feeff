"""Plans and preprocesses data sets with the real nnU-Net v2 and with autossl in turn: compares every voxel, and times.

    python benchmarks/preprocessing_versus_nnunet.py --nnunet ENV --raw FOLDER [--only TEXT ...] [--n_workers 2]
        [--repeats 1] [-o preprocessing_versus_nnunet.json]

ENV is an environment with nnunetv2 2.8.1 (its bin/ holds nnUNetv2_plan_and_preprocess); FOLDER holds the data sets
Dataset004_Hippocampus, Dataset011_LGGMultiMR and Dataset012_FetalHeadUS. Scenarios: the three data sets at the spacing
that the planners choose, hippocampus and LGG at a spacing that forces resampling, and two synthetic sets that this
script makes: CT with thick slices and many labels, and skull-stripped MR stored with the coarse axis last, where images
are normalized within the nonzero region. Both programs run as their users run them, start and imports included, with
the same number of processes; ours always checks the data set, nnU-Net once without its check and once with it.
nnU-Net is told to use its reader that reorients to RAS+ (for NIfTI), as autossl does.
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
import scipy
from scipy.ndimage import gaussian_filter

from autossl.data.files import read_json, write_json
from autossl.data.store import CaseStore
from autossl.planners.plan_and_preprocess import find_plans

TOLERANCE = 1e-3
THREADS = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Scenario:
    """One data set, prepared once by both programs."""

    name: str
    dataset: str
    configurations: tuple[str, ...]
    target_spacing: tuple[float, float, float] | None = None


SCENARIOS = (
    Scenario("hippocampus", "Dataset004_Hippocampus", ("2d", "3d_fullres")),
    Scenario("lgg", "Dataset011_LGGMultiMR", ("2d", "3d_fullres")),
    Scenario("ultrasound", "Dataset012_FetalHeadUS", ("2d",)),
    Scenario("hippocampus_forced", "Dataset004_Hippocampus", ("2d", "3d_fullres"), (1.2, 0.8, 1.0)),
    Scenario("lgg_forced", "Dataset011_LGGMultiMR", ("2d", "3d_fullres"), (3.0, 0.8, 0.8)),
    Scenario("synthetic_ct", "Dataset901_SyntheticCT", ("2d", "3d_fullres")),
    Scenario("synthetic_mr", "Dataset902_SyntheticMaskedMR", ("2d", "3d_fullres")),
)


# ------------------------------------------------------------------------------------------------------ synthetic sets


def make_synthetic_ct(folder: Path, cases: int = 8) -> None:
    """Bodies of soft tissue in air at -1024 HU, table air cut off, organs with nested labels; spacings vary."""
    labels = {"background": 0, "liver": 1, "tumor": 2, "kidney": 3, "spleen": 4, "bone": 5}
    _describe(folder, {"0": "CT"}, labels, cases)
    for case in range(cases):
        rng = np.random.default_rng([1, case])
        shape = tuple(int(n) for n in rng.integers((22, 90, 90), (40, 130, 130)))
        spacing_zyx = (float(rng.choice([3.0, 5.0, 7.5])), *([float(rng.uniform(0.6, 1.4))] * 2))
        field = gaussian_filter(rng.normal(size=shape), (1.2, 6, 6))
        field /= field.std()
        label = np.digitize(field, [0.6, 1.0, 1.5, 1.9, 2.4]).astype(np.uint8)
        radius = np.linspace(-1, 1, shape[1])[:, None] ** 2 + np.linspace(-1, 1, shape[2]) ** 2
        body = np.broadcast_to(radius < 0.8, shape)
        label[~body] = 0
        hounsfield = np.where(body, 40 + 25 * label + rng.normal(0, 18, shape), -1024)
        hounsfield[:, :3] = 0  # padding by the reconstruction, to be cropped
        _write_case(folder, f"ct_{case:03d}", [hounsfield.astype(np.int16)], label, spacing_zyx)


def make_synthetic_mr(folder: Path, cases: int = 6) -> None:
    """Two channels, zero outside a ball that fills a part of the volume, coarse axis stored as x; ventricles are 0."""
    _describe(folder, {"0": "T1", "1": "FLAIR"}, {"background": 0, "edema": 1, "core": 2}, cases)
    for case in range(cases):
        rng = np.random.default_rng([2, case])
        shape = tuple(int(n) for n in rng.integers((70, 80, 16), (90, 100, 24)))
        spacing_zyx = (float(rng.uniform(0.8, 1.2)), 1.0, float(rng.choice([3.9, 4.5, 5.0])))
        grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        brain = sum(axis**2 for axis in grid) < 0.75
        field = gaussian_filter(rng.normal(size=shape), (4, 4, 1))
        field /= field.std()
        hole = (np.abs(grid[0]) < 0.12) & (np.abs(grid[1]) < 0.2) & (np.abs(grid[2]) < 0.3)
        label = np.where(brain & ~hole, np.digitize(field, [1.0, 1.7]), 0).astype(np.uint8)
        channels = [
            np.where(brain & ~hole, 200.0 * (c + 1) + 30.0 * label + rng.normal(0, 20, shape), 0).astype(np.float32)
            for c in range(2)
        ]
        _write_case(folder, f"mr_{case:03d}", channels, label, spacing_zyx)


def _describe(folder: Path, channels: dict[str, str], labels: dict[str, int], cases: int) -> None:
    content = {"channel_names": channels, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", content)


def _write_case(
    folder: Path, case: str, channels: list[np.ndarray], label: np.ndarray, spacing_zyx: tuple[float, ...]
) -> None:
    affine = np.diag([*spacing_zyx[::-1], 1.0])
    files = {f"imagesTr/{case}_{i:04d}": channel for i, channel in enumerate(channels)}
    for name, array in (files | {f"labelsTr/{case}": label}).items():
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), path)  # type: ignore[no-untyped-call]


# ----------------------------------------------------------------------------------------------------------- the runs


def link_dataset(source: Path, raw: Path) -> None:
    """The data set in another folder, with a dataset.json that names nnU-Net's reader."""
    folder = raw / source.name
    folder.mkdir(parents=True)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).symlink_to(source / name)
    description = read_json(source / "dataset.json")
    if description["file_ending"] == ".nii.gz":
        description["overwrite_image_reader_writer"] = "NibabelIOWithReorient"
    write_json(folder / "dataset.json", description)


def timed(command: list[str], environment: dict[str, str]) -> float:
    """Seconds of wall time of a command; its output is shown where it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | THREADS | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def run_nnunet(env: Path, root: Path, scenario: Scenario, n_workers: int, check: bool) -> float:
    """Plans and preprocesses into root/nnunet, from nothing."""
    subprocess.run(["rm", "-rf", str(root / "nnunet")], check=True)
    folders = {"nnUNet_raw": root / "raw", "nnUNet_preprocessed": root / "nnunet", "nnUNet_results": root / "none"}
    command = [str(env / "bin" / "nnUNetv2_plan_and_preprocess"), "-d", scenario.dataset[7:10]]
    command += ["-c", *scenario.configurations, "-np", *([str(n_workers)] * len(scenario.configurations))]
    command += ["-npfp", str(n_workers)]
    if check:
        command += ["--verify_dataset_integrity"]
    if scenario.target_spacing:
        command += ["-overwrite_target_spacing", *map(str, scenario.target_spacing), "-overwrite_plans_name", "forced"]
    path = f"{env / 'bin'}:{os.environ['PATH']}"
    return timed(command, {name: str(folder) for name, folder in folders.items()} | {"PATH": path})


def run_ours(root: Path, scenario: Scenario, n_workers: int) -> float:
    """Plans and preprocesses into root/preprocessed, from nothing; the data set is always checked."""
    subprocess.run(["rm", "-rf", str(root / "preprocessed")], check=True)
    command = [str(Path(sys.executable).with_name("autossl_plan_and_preprocess")), "-d", scenario.dataset]
    command += ["-c", *scenario.configurations, "-np", str(n_workers), "--verify_dataset_integrity"]
    command += ["--workspace", str(root)]
    if scenario.target_spacing:
        command += ["--overwrite_target_spacing", *map(str, scenario.target_spacing)]
    return timed(command, {})


def compare(root: Path, scenario: Scenario) -> dict[str, Any]:
    """Largest difference of image values and number of different label voxels per configuration, over all cases."""
    plans = find_plans(root / "preprocessed" / scenario.dataset)
    theirs = root / "nnunet" / scenario.dataset
    plans_name = "forced" if scenario.target_spacing else "nnUNetPlans"
    result: dict[str, Any] = {}
    for configuration in scenario.configurations:
        store = CaseStore(root / "preprocessed" / scenario.dataset / "data" / plans.data_hash(configuration))
        folder = theirs / f"{plans_name}_{configuration}"
        largest, different, voxels, resampled, outside = 0.0, 0, 0, 0, 0
        files = sorted(path for path in folder.glob("*.b2nd") if not path.name.endswith("_seg.b2nd"))
        for file in files:
            case = file.name.removesuffix(".b2nd")
            image, label = blosc2.open(str(file))[:], blosc2.open(str(folder / f"{case}_seg.b2nd"))[0]
            ours = store.image(case)[:]
            if ours.shape != image.shape:
                raise RuntimeError(f"{scenario.name}, {case}: {ours.shape} here, {image.shape} there")
            largest = max(largest, float(np.abs(ours - image).max()))
            different += int((store.label(case)[:] != np.maximum(label, 0)).sum())
            voxels += label.size
            properties = store.properties(case)
            resampled += properties.shape != properties.shape_after_crop
            if properties.has_nonzero_mask:  # nnU-Net resamples its -1 together with the labels
                outside += int((store.nonzero(case)[:] != (label >= 0)).sum())
        result[configuration] = {
            "spacing": list(plans.configuration(configuration).spacing),
            "transpose_forward": list(plans.transpose_forward),
            "use_mask_for_norm": any(plans.configuration(configuration).use_mask_for_norm),
            "cases": len(files),
            "resampled_cases": resampled,
            "largest_image_difference": largest,
            "different_label_voxels": different,
            "different_mask_voxels": outside,
            "label_voxels": voxels,
        }
    return result


def run_scenario(scenario: Scenario, arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Both programs in turn, as often as asked; the fastest run of each counts."""
    source = arguments.raw / scenario.dataset
    if scenario.dataset.startswith("Dataset9"):
        source = root / "made" / scenario.dataset
        make = make_synthetic_ct if scenario.dataset.endswith("CT") else make_synthetic_mr
        make(source)
    link_dataset(source, root / "raw")
    seconds: dict[str, list[float]] = {"ours": [], "nnunet": [], "nnunet_checked": []}
    for _ in range(arguments.repeats):
        seconds["ours"].append(run_ours(root, scenario, arguments.n_workers))
        seconds["nnunet_checked"].append(run_nnunet(arguments.nnunet, root, scenario, arguments.n_workers, True))
        seconds["nnunet"].append(run_nnunet(arguments.nnunet, root, scenario, arguments.n_workers, False))
    best = {name: min(times) for name, times in seconds.items()}
    return {
        "values": compare(root, scenario),
        "seconds": seconds,
        "ours_over_nnunet_without_its_check": best["ours"] / best["nnunet"],
        "ours_over_nnunet": best["ours"] / best["nnunet_checked"],
    }


def main() -> int:
    """Exit code 1 where a value differs by more than the tolerance, or a label by a voxel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet", type=Path, required=True)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[scenario.name for scenario in SCENARIOS])
    parser.add_argument("--n_workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("preprocessing_versus_nnunet.json"))
    arguments = parser.parse_args()
    results, good = {}, True
    for scenario in SCENARIOS:
        if scenario.name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory(prefix="preprocessing_") as folder:
            found = results[scenario.name] = run_scenario(scenario, arguments, Path(folder))
        for configuration, values in found["values"].items():
            print(scenario.name, configuration, json.dumps(values), flush=True)
            good &= values["largest_image_difference"] <= TOLERANCE and values["different_label_voxels"] == 0
        print(scenario.name, json.dumps({k: v for k, v in found.items() if k != "values"}), flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "n_workers": arguments.n_workers,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("autossl", "numpy", "blosc2")} | {"scipy": scipy.__version__},
        "commit": commit,
    }
    write_json(arguments.output, {"machine": machine, "scenarios": results})
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
