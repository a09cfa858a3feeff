"""The whole way on a made-up data set: plan, train two methods, predict, evaluate, draw. Behind `autossl_demo`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from autossl.data.image_io import read_image, read_label
from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.raw_dataset import RawDataset, read_raw_dataset
from autossl.data.workspace import Workspace
from autossl.evaluation.evaluate import Evaluation, evaluate_folder
from autossl.evaluation.pictures import PicturedCase, draw_outlines
from autossl.inference.predict import predict
from autossl.inference.request import PredictRequest
from autossl.planners.plan_and_preprocess import PlanRequest, plan_and_preprocess
from autossl.planners.plan_experiment import PlanOptions
from autossl.trainers.train import TrainHooks, TrainRequest, train

OnProgress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo makes and trains; chosen to end within 5 minutes on 2 CPU cores."""

    phantom: PhantomSettings = field(default_factory=PhantomSettings)
    configuration: str = "3d_fullres"
    preset: str = "nano"
    methods: tuple[str, ...] = ("supervised", "mean_teacher")
    """Trained at the same number of steps, with the same seed and cases."""
    steps: int = 300
    fold: str = "0"
    seed: int = 0
    device: str = "auto"
    n_pictured: int = 3


@dataclass(frozen=True)
class DemoResult:
    """What came out."""

    workspace: Workspace
    evaluations: Mapping[str, Evaluation]
    """Method → its scores on the test cases."""
    runs: Mapping[str, Path]
    """Method → its run folder."""
    picture: Path
    seconds: float


def run_demo(folder: Path, settings: DemoSettings | None = None, on_progress: OnProgress | None = None) -> DemoResult:
    """Makes the data, plans, trains, predicts the test cases, scores them and draws some.

    Everything lies in `folder`, which becomes a workspace. A second call goes on where the first one ended.

    Args:
        folder: New, empty, or of an earlier demo.
        settings: Sizes and methods.
        on_progress: Called as the steps go on.

    Raises:
        InvalidInput: The folder holds something else.
    """
    start = time.monotonic()
    settings, report = settings or DemoSettings(), on_progress or (lambda what, done, total: None)
    workspace = Workspace.locate(folder)
    dataset = make_phantom_dataset(workspace.raw, settings.phantom)
    options = PlanOptions(preset=settings.preset, configurations=(settings.configuration,))
    plan_and_preprocess(
        PlanRequest(settings.phantom.name, workspace.root, options),
        lambda stage, case, done, total: report(f"plan and preprocess: {stage}", done, total),
    )
    runs = {method: _train(workspace, settings, method, report) for method in settings.methods}
    evaluations = {
        method: _predict_and_score(dataset, run, workspace.root / "predictions" / method, settings.device, report)
        for method, run in runs.items()
    }
    picture = workspace.root / "pictures.png"
    draw_outlines(picture, _pictured_cases(read_raw_dataset(dataset), evaluations, settings.n_pictured))
    return DemoResult(workspace, evaluations, runs, picture, time.monotonic() - start)


def _train(workspace: Workspace, settings: DemoSettings, method: str, report: OnProgress) -> Path:
    request = TrainRequest(
        dataset=settings.phantom.name,
        configuration=settings.configuration,
        folds=(settings.fold,),
        method=method,
        workspace=workspace.root,
        preset=settings.preset,
        steps=settings.steps,
        seed=settings.seed,
        device=settings.device,
        resume=True,
    )
    hooks = TrainHooks(
        on_step=lambda fold, done, total, losses: report(f"train {method}", done, total), handle_signals=True
    )
    return train(request, hooks).folder


def _predict_and_score(dataset: Path, run: Path, output: Path, device: str, report: OnProgress) -> Evaluation:
    """Segments the test cases of the dataset with a run and scores them; `output` is named after the method."""
    request = PredictRequest(input=dataset / "imagesTs", output=output, model=run, device=device, overwrite=True)
    predict(request, lambda at: report(f"predict with {output.name}", at.done + int(at.share), at.total))
    schema = read_raw_dataset(dataset).description.label_schema()
    return evaluate_folder(output, dataset / "labelsTs", schema, output=output / "summary.json")


def _pictured_cases(raw: RawDataset, evaluations: Mapping[str, Evaluation], number: int) -> list[PicturedCase]:
    """The first test cases with their reference and each method's segmentation."""
    rows = []
    for case in raw.test[:number]:
        image = read_image(case.images)
        maps, notes = {}, {}
        if case.label is not None:
            maps["reference"] = read_label(case.label)[0]
        for method, evaluation in evaluations.items():
            maps[method] = read_label(evaluation.predictions / f"{case.id}{raw.description.file_ending}")[0]
            scores = evaluation.cases[case.id]
            notes[method] = ", ".join(f"{name} {score.metrics['dice']:.2f}" for name, score in scores.items())
        rows.append(PicturedCase(case.id, image.array[0], image.spacing_zyx_mm, maps, notes))
    return rows
