"""A sound workspace to be spoiled: a planned and prepared data set, a run, and the run as an archive."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from autossl.data.files import write_json
from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.runs import CHECKPOINT_FINAL, RunSpec
from autossl.inference.model_folder import DESCRIPTION_FILE, PLANS_FILE
from autossl.interop.model_archive import ExportRequest, export_model
from autossl.networks.build import build_network
from autossl.networks.prediction import Member, PredictionSpec
from autossl.planners import foreground
from autossl.planners.plan_and_preprocess import PlanRequest, PlanResult, plan_and_preprocess
from autossl.planners.plan_experiment import PlanOptions
from autossl.planners.plans import write_plans
from autossl.trainers.checkpoints import write_checkpoint

DATASET = "Dataset001_Sound"
PRESET = "nano"
CONFIGURATION = "3d_fullres"
RUN = f"results/{DATASET}/default/{CONFIGURATION}__{PRESET}__supervised__seed-0"
SHAPE = (20, 20, 20)
foreground.DRAWS_IN_ALL = 10_000  # a hundred million draws for the intensities would take most of the time


@dataclass(frozen=True)
class Materials:
    """What is spoiled; never written to."""

    folder: Path

    @property
    def workspace(self) -> Path:
        """With the data set, its plans, its prepared cases and one run."""
        return self.folder / "workspace"

    @property
    def raw(self) -> Path:
        """The data set's folder."""
        return self.workspace / "raw" / DATASET

    @property
    def archive(self) -> Path:
        """The run as `autossl_export_model` writes it."""
        return self.folder / "model.zip"

    def first(self, pool: str) -> Path:
        """A file of a folder of the data set."""
        return sorted((self.raw / pool).iterdir())[0]

    def copy_workspace(self, target: Path) -> None:
        """Hard links: everything here is replaced by renaming, nothing is changed in its place."""
        shutil.copytree(self.workspace, target, copy_function=os.link)

    def digest(self) -> str:
        """Of all files; the same after the campaign as before it."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            digest.update(str(path.relative_to(self.folder)).encode() + path.read_bytes())
        return digest.hexdigest()


def make_materials(folder: Path) -> Materials:
    """Made once; found again where they are complete."""
    materials = Materials(folder)
    if materials.archive.exists():
        return materials
    shutil.rmtree(folder, ignore_errors=True)
    settings = PhantomSettings(DATASET, n_labeled=5, n_unlabeled=1, n_test=1, shape_zyx=SHAPE)
    make_phantom_dataset(materials.workspace / "raw", settings)
    ids = sorted(path.name.removesuffix("_0000.nii.gz") for path in materials.raw.glob("images*/*"))
    rows = "".join(f"{case},patient{number},site{number % 2}\n" for number, case in enumerate(ids))
    (materials.raw / "cases.csv").write_text(f"case,patient,site\n{rows}")
    options = PlanOptions(preset=PRESET, configurations=(CONFIGURATION,))
    planned = plan_and_preprocess(PlanRequest(DATASET, workspace=materials.workspace, options=options, n_workers=0))
    _write_run(materials.workspace / RUN, planned)
    export_model(ExportRequest(materials.workspace / RUN, materials.archive, materials.workspace))
    return materials


def _write_run(folder: Path, planned: PlanResult) -> None:
    """A finished fold whose network was never trained: what it predicts does not matter here."""
    plans, plan = planned.plans, planned.plans.configuration(CONFIGURATION)
    spec = RunSpec(
        dataset=DATASET,
        split="default",
        configuration=CONFIGURATION,
        preset=PRESET,
        method="supervised",
        seed=0,
        plans_hash=plans.hash(),
        total_steps=1,
    )
    write_json(folder / "run.json", spec.model_dump(mode="json"))
    write_plans(folder / PLANS_FILE, plans)
    shutil.copy(planned.folder / DESCRIPTION_FILE, folder / DESCRIPTION_FILE)
    prediction = PredictionSpec(members=(Member(name="network", architecture=plan.architecture),))
    network = build_network(plan.architecture, plan.n_channels, 3, seed=0)
    content = {"networks": {"network": network.state_dict()}, "prediction": prediction.to_json()}
    write_checkpoint(folder / "fold_0" / CHECKPOINT_FINAL, content)
