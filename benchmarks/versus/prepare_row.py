"""Plan and preprocess: the whole command, from a raw dataset to what training reads."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from autossl.data.files import read_json
from autossl.data.store import CaseStore
from autossl.planners.plan_and_preprocess import find_plans

from .bench import DEFAULTS, OURS, Bench, Call, copy_dataset, cores, worker_counts
from .made_up_sets import make_ct, make_masked_mr

TOLERANCE = 1e-3
"""Of normalized image values."""
PLANS = "nnUNetPlans"
PLANS_FORCED = "nnUNetPlansForced"
MADE_UP = {"Dataset901_SyntheticCT": make_ct, "Dataset902_SyntheticMaskedMR": make_masked_mr}


@dataclass(frozen=True)
class PrepareRow:
    """A dataset, at the planners' spacing or at a given one. Ours checks every voxel beforehand, nnU-Net nothing."""

    bench: Bench
    name: str
    dataset: str
    target_spacing: tuple[float, float, float] | None = None
    target: dict[str, float] = field(default_factory=dict)
    time: str = "wall_s"

    @property
    def what(self) -> str:
        """A sentence."""
        at = f" at {' x '.join(map(str, self.target_spacing))} mm" if self.target_spacing else ""
        return f"plan and preprocess {self.dataset}{at}, all planned configurations"

    @property
    def folder(self) -> Path:
        """Everything of this row."""
        return self.bench.work / self.name

    def settings(self) -> dict[str, Any]:
        """What is prepared."""
        spacing = list(self.target_spacing) if self.target_spacing else None
        return {"dataset": self.dataset, "target_spacing": spacing, "cases": self.bench.cases or "all"}

    def prepare(self) -> None:
        """Copies the raw dataset, or makes it up."""
        source = self.bench.data / self.dataset
        if self.dataset in MADE_UP:
            source = self.folder / "made_up" / self.dataset
            shutil.rmtree(source, ignore_errors=True)
            MADE_UP[self.dataset](source)
        copy_dataset(source, self.folder / "raw", self.bench.cases)

    def variants(self) -> dict[str, Call]:
        """nnU-Net: its defaults (8 processes, 4 for 3d_fullres), and as many as cores."""
        counts = worker_counts(self.bench, (cores(),))
        theirs = {f"nnunet {count} workers": self._their_call(count) for count in counts}
        return {OURS: self.run_ours, DEFAULTS: self._their_call(None), **theirs}

    def run_ours(self) -> dict[str, float]:
        """Into preprocessed/, from nothing."""
        shutil.rmtree(self.folder / "preprocessed", ignore_errors=True)
        command = [self.bench.ours("autossl_plan_and_preprocess"), "-q", "-d", self.dataset]
        command += ["--verify_dataset_integrity", "--workspace", str(self.folder)]
        if self.target_spacing:
            command += ["--overwrite_target_spacing", *map(str, self.target_spacing)]
        return self.bench.run(command, self.folder).to_json()

    def run_theirs(self, workers: int | None) -> dict[str, float]:
        """Into nnunet_preprocessed/, from nothing."""
        shutil.rmtree(self.folder / "nnunet_preprocessed", ignore_errors=True)
        command = [self.bench.theirs("nnUNetv2_plan_and_preprocess"), "-d", self.dataset[7:10], "--no_pbar"]
        command += [] if workers is None else ["-np", str(workers), "-npfp", str(workers)]
        if self.target_spacing:
            spacing = map(str, self.target_spacing)
            command += ["-overwrite_target_spacing", *spacing, "-overwrite_plans_name", PLANS_FORCED]
        return self.bench.run(command, self.folder).to_json()

    def same_work(self) -> dict[str, Any]:
        """Plans, measurements and every preprocessed voxel."""
        ours, theirs = self.folder / "preprocessed" / self.dataset, self.folder / "nnunet_preprocessed" / self.dataset
        plans_name = PLANS_FORCED if self.target_spacing else PLANS
        planned = read_json(theirs / f"{plans_name}.json")["configurations"]
        planned = {name: entry for name, entry in planned.items() if "data_identifier" in entry}  # no cascade
        stored = {
            name: _differences(ours, theirs, name, planned[name])
            for name in find_plans(ours).configurations
            if name in planned
        }
        fingerprint = fingerprint_differences(
            read_json(ours / "fingerprint.json"), read_json(theirs / "dataset_fingerprint.json")
        )
        same = set(find_plans(ours).configurations) == set(planned)
        same = same and fingerprint["spacings_equal"] and fingerprint["shapes_equal"]
        for values in stored.values():
            same = same and values["largest_image_difference"] <= TOLERANCE and not values["different_label_voxels"]
            same = same and values["patch_size"] == values["patch_size_there"]
        return {"same": bool(same), "fingerprint": fingerprint, "configurations": stored}

    def _their_call(self, workers: int | None) -> Call:
        return lambda: self.run_theirs(workers)


def prepare_rows(bench: Bench) -> list[PrepareRow]:
    """Those with a target."""
    hippocampus, lgg = "Dataset004_Hippocampus", "Dataset011_LGGMultiMR"
    as_is, forced = {"time": 1 / 3}, {"time": 1 / 4}
    return [
        PrepareRow(bench, "prepare_hippocampus", hippocampus, target=as_is),
        PrepareRow(bench, "prepare_lgg", lgg, target=as_is),
        PrepareRow(bench, "prepare_hippocampus_forced", hippocampus, (1.2, 0.8, 1.0), target=forced),
        PrepareRow(bench, "prepare_lgg_forced", lgg, (3.0, 0.8, 0.8), target=forced),
    ]


def further_prepare_rows(bench: Bench) -> list[PrepareRow]:
    """Pictures; CT with thick slices and many labels; skull-stripped MR stored with the coarse axis last."""
    return [
        PrepareRow(bench, "prepare_ultrasound", "Dataset012_FetalHeadUS"),
        *(PrepareRow(bench, f"prepare_{name[20:].lower()}", name) for name in MADE_UP),
    ]


def fingerprint_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Of what both measured on the labeled cases; intensities as the largest relative difference of each property."""
    labeled = [case for case in ours["cases"].values() if case["pool"] == "labeled"]
    key, relative = "foreground_intensity_properties_per_channel", {}
    for channel, properties in theirs[key].items():
        for name, value in properties.items():
            found = ours[key][channel][name]
            deviation = 0.0 if found == value else abs(found - value) / max(abs(value), 1e-12)
            relative[name] = max(relative.get(name, 0.0), deviation)
    return {
        "spacings_equal": [case["spacing_zyx_mm"] for case in labeled] == theirs["spacings"],
        "shapes_equal": [case["shape_after_crop_zyx"] for case in labeled] == theirs["shapes_after_crop"],
        "largest_relative_difference": relative,
    }


def _differences(ours: Path, theirs: Path, configuration: str, their_plan: dict[str, Any]) -> dict[str, Any]:
    """Over all cases of a configuration.

    Args:
        ours: our folder of the preprocessed dataset.
        theirs: nnU-Net's.
        configuration: its name.
        their_plan: of the configuration.
    """
    plans = find_plans(ours)
    plan = plans.configuration(configuration)
    store = CaseStore(ours / "data" / plans.data_hash(configuration))
    largest, labels, outside, voxels, resampled = 0.0, 0, 0, 0, 0
    folder = theirs / their_plan["data_identifier"]
    files = sorted(path for path in folder.glob("*.b2nd") if not path.name.endswith("_seg.b2nd"))
    for file in files:
        case = file.name.removesuffix(".b2nd")
        image, label = blosc2.open(str(file))[:], blosc2.open(str(folder / f"{case}_seg.b2nd"))[0]
        here = store.image(case)[:]
        if here.shape != image.shape:
            raise SystemExit(f"{case}, {configuration}: {here.shape} here, {image.shape} there")
        largest = max(largest, float(np.abs(here - image).max()))
        labels += int((store.label(case)[:] != np.maximum(label, 0)).sum())
        properties = store.properties(case)
        if properties.has_nonzero_mask:  # nnU-Net resamples its -1 together with the labels
            outside += int((store.nonzero(case)[:] != (label >= 0)).sum())
        resampled += properties.shape != properties.shape_after_crop
        voxels += label.size
    return {
        "cases": len(files),
        "resampled_cases": int(resampled),
        "spacing": list(plan.spacing),
        "patch_size": list(plan.patch_size),
        "patch_size_there": list(their_plan["patch_size"]),
        "transpose_forward": list(plans.transpose_forward),
        "use_mask_for_norm": any(plan.use_mask_for_norm),
        "largest_image_difference": largest,
        "label_voxels": voxels,
        "different_label_voxels": labels,
        "different_mask_voxels": outside,
    }
