"""A workspace with a made-up dataset, planned and preprocessed in 2D."""

from __future__ import annotations

from pathlib import Path

from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.workspace import Workspace
from autossl.planners.plan_and_preprocess import PlanRequest, plan_and_preprocess
from autossl.planners.plan_experiment import PlanOptions


def planned_phantom(root: Path, phantom: PhantomSettings) -> Workspace:
    """With the preset nano."""
    workspace = Workspace(root)
    make_phantom_dataset(workspace.raw, phantom)
    options = PlanOptions(preset="nano", configurations=("2d",))
    plan_and_preprocess(PlanRequest(phantom.name, workspace.root, options, n_workers=1))
    return workspace
