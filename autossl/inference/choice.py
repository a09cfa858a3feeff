"""Which model a request names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autossl.data.runs import choose_run
from autossl.data.workspace import Workspace
from autossl.inference.final_model import FinalModel, planned_model
from autossl.inference.inference_plan import (
    INFERENCE_PLAN_FILE,
    choose_inference_plan,
    read_inference_plan,
    workspace_of_plan,
)
from autossl.inference.model_folder import read_model
from autossl.inference.postprocess import Rule
from autossl.inference.request import PredictRequest


@dataclass(frozen=True)
class ChosenModel:
    """What predicts."""

    model: FinalModel
    rules: tuple[Rule, ...]
    """For the label maps: those of the inference plan, then those of the request."""
    plan: Path | None = None
    """The inference plan that named them."""


def choose_model(request: PredictRequest) -> ChosenModel:
    """The run, or the runs and rules of an inference plan.

    Raises:
        InvalidInput: none fits, or several do, or what fits cannot be read.
    """
    folder, path, rules = request.model, None, request.postprocessing
    if folder is None:
        workspace = Workspace.locate(request.workspace)
        dataset = workspace.find_dataset(request.dataset or "")
        path = choose_inference_plan(workspace, dataset, request.run) if request.folds is None else None
        folder = None if path is not None else choose_run(workspace, dataset, request.run).folder
    elif (Path(folder) / INFERENCE_PLAN_FILE).is_file() and request.folds is None:
        path = Path(folder) / INFERENCE_PLAN_FILE
        workspace = workspace_of_plan(path)
    if path is not None:
        plan = read_inference_plan(path)
        return ChosenModel(planned_model(workspace, plan, path), (*plan.postprocessing, *rules), path)
    return ChosenModel(FinalModel((read_model(Path(folder or ""), request.folds),)), rules)
