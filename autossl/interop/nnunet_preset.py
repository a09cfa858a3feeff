"""The plan of an imported model as a preset of a dataset, so that its very network can be trained on."""

from __future__ import annotations

from pathlib import Path

from autossl.data.problems import InvalidInput, Problem
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.workspace import Workspace
from autossl.inference.model_folder import TrainedModel
from autossl.planners.fingerprint import read_fingerprint
from autossl.planners.plan_and_preprocess import FINGERPRINT, PLANS_PREFIX, Progress, plans_file, preprocess_planned
from autossl.planners.plans import Plans, read_plans, write_plans


def plan_training(
    model: TrainedModel,
    workspace: Path | None = None,
    n_workers: int | None = None,
    on_progress: Progress | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes plans_PRESET.json beside the dataset's own plans, and preprocesses the cases for it.

    Sizes, network and preprocessing are the model's; what the unlabeled cases ask for (steps, ramps, classes that are
    one piece) is taken from the dataset's own plans.

    Raises:
        InvalidInput: the dataset is not planned, has other channels or labels than the model, or has other plans of
            that name.
    """
    home = Workspace.locate(workspace)
    name, folder = model.run.dataset, home.preprocessed_folder(model.run.dataset)
    path = plans_file(folder, model.plans.preset)
    own = [found for found in sorted(folder.glob(f"{PLANS_PREFIX}*.json")) if found != path]
    if not own or not (folder / FINGERPRINT).is_file():
        fix = f"run autossl_plan_and_preprocess -d {name} first"
        raise InvalidInput(
            Problem(f"{name} is not planned", "plans of its own, which know its cases", fix, file=folder)
        )
    raw = read_raw_dataset(home.raw_folder(name))
    ours, theirs = raw.description, model.description
    pairs = (("channels", ours.n_channels, theirs.n_channels), ("labels", ours.label_schema(), theirs.label_schema()))
    problems = [
        Problem(
            f"the model's {what}: {its}", f"those of {name}: {here}", "train without --plan_training", file=raw.folder
        )
        for what, here, its in pairs
        if here != its
    ]
    plans = _with_decisions_of(model, read_plans(own[0]))
    if path.is_file() and not overwrite and read_plans(path).hash() != plans.hash():
        problems.append(Problem("other plans of that name", "a name that is free", "use --overwrite", file=path))
    if problems:
        raise InvalidInput(problems)
    wanted = (model.run.configuration,)
    preprocess_planned(raw, read_fingerprint(folder / FINGERPRINT), plans, wanted, folder, n_workers, on_progress)
    write_plans(path, plans)
    return path


def _with_decisions_of(model: TrainedModel, own: Plans) -> Plans:
    decisions = own.semi_supervised.model_copy(update={"recommended_configuration": model.run.configuration})
    reason = f"as in the preset {own.preset} of this dataset; the rest is the imported model's"
    why = {key: text for key, text in model.plans.why.items() if key != "semi_supervised"}
    return model.plans.model_copy(update={"semi_supervised": decisions, "why": why | {"semi_supervised": reason}})
