"""An experiment on a planned phantom dataset, and finished runs of untrained networks for a stand-in to copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from autossl.data.files import write_json
from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.runs import FoundRun
from autossl.data.workspace import Workspace
from autossl.evaluation.evaluate import EvaluationOptions, evaluate_folder
from autossl.evaluation.out_of_fold import predict_out_of_fold
from autossl.inference.checkpoint import FORMAT
from autossl.networks.build import build_network
from autossl.networks.prediction import Member, PredictionSpec
from autossl.pipeline.arrange import arrange
from autossl.pipeline.engine import engine_named
from autossl.pipeline.request import ExperimentRequest, check_request
from autossl.pipeline.steps import Ledger
from autossl.pipeline.training_steps import planning_steps
from autossl.pipeline.trainings import Experiment, Training
from autossl.planners.plans import write_plans
from autossl.preprocessing.preprocess import preprocess_cases

PHANTOM = PhantomSettings(n_labeled=6, n_unlabeled=2, n_test=0, shape_zyx=(4, 16, 16))


def base_request(root: Path) -> ExperimentRequest:
    """Three labels in three folds, one hidden patient, the twin and one method."""
    return ExperimentRequest(
        dataset=PHANTOM.name,
        workspace=root,
        configurations=("2d",),
        methods=("mean_teacher",),
        preset="nano",
        labeled="3",
        steps=4,
        device="cpu",
        n_label_next=2,
        num_processes=1,
    )


def plan_phantom(root: Path) -> Workspace:
    """Plans and split, nothing else."""
    workspace = Workspace(root)
    make_phantom_dataset(workspace.raw, PHANTOM)
    steps = planning_steps(base_request(root), *check_request(base_request(root)))
    engine_named("local", ("cpu",), root).run(steps, Ledger(root, root))
    return workspace


def finish_runs(planned: Workspace, root: Path) -> Path:
    """Folds as training leaves them, of untrained networks; the folder that FAKE_FINISHED names."""
    workspace = Workspace(shutil.copytree(planned.root, root))
    experiment = arrange(base_request(workspace.root))
    twin = experiment.trainings[0].setup
    preprocess_all(experiment)
    for number, training in enumerate(experiment.trainings):
        write_untrained(training, first_seed=10 * number)
        predict_out_of_fold(FoundRun(training.folder, training.spec), workspace, "cpu")
        for fold in training.folds:
            cases = EvaluationOptions(cases=training.setup.folds[fold].validation)
            predictions = training.summary(fold).parent
            evaluate_folder(predictions, twin.label_folder, twin.schema, cases, output=training.summary(fold))
    return workspace.results_folder(PHANTOM.name)


def preprocess_all(experiment: Experiment) -> None:
    """What the step does, without its step."""
    setup = experiment.trainings[0].setup
    preprocess_cases(setup.raw, setup.plans, "2d", setup.store, 1, remap_labels={})


def write_untrained(training: Training, first_seed: int) -> None:
    """Run folder with checkpoints of freshly initialized networks."""
    setup, plan = training.setup, training.setup.configuration
    write_json(training.folder / "run.json", training.spec.model_dump(mode="json"))
    write_plans(training.folder / "plans.json", setup.plans)
    write_json(training.folder / "dataset.json", setup.description.to_json())
    prediction = PredictionSpec(members=(Member(name="student", architecture=plan.architecture),)).to_json()
    for seed, fold in enumerate(training.folds, start=first_seed):
        network = build_network(plan.architecture, plan.n_channels, setup.schema.n_outputs, seed=seed)
        training.fold_folder(fold).mkdir(parents=True)
        content = {"format": FORMAT, "networks": {"student": network.state_dict()}, "prediction": prediction}
        torch.save(content, training.fold_folder(fold) / "checkpoint_final.pth")
