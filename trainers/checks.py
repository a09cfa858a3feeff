"""What is wrong with a request for a training, told all together before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autossl.data.problems import InvalidInput, Problem
from autossl.data.raw_dataset import RawDataset
from autossl.planners.fingerprint import Fingerprint
from autossl.planners.plans import Plans

if TYPE_CHECKING:
    from autossl.trainers.setup import RunSetup, TrainRequest


def check_numbers(request: TrainRequest) -> None:
    """Raises where options contradict each other or lie outside of what they may be."""
    problems = []
    if request.steps is not None and request.hours is not None:
        problems.append(Problem("--steps and --hours together", "one of them", "leave one out"))
    if request.steps is not None and request.steps < 1:
        problems.append(Problem(f"--steps {request.steps}", "at least 1", "give a positive number"))
    if request.budget_kind == "deployment" and request.labeled is None:
        problems.append(Problem("--deployment without a budget", "--labeled N beside it", "give the number of labels"))
    if request.hours is not None and request.hours <= 0:
        problems.append(Problem(f"--hours {request.hours}", "more than 0", "give a positive number"))
    if request.num_workers is not None and not 0 <= request.num_workers <= 256:
        problems.append(Problem(f"--num_workers {request.num_workers}", "0 to 256", "give a number in this range"))
    if not request.folds:
        problems.append(Problem("no fold", "fold numbers, all_folds or all", "name at least one"))
    if "all_folds" in request.folds and len(request.folds) > 1:
        problems.append(Problem("all_folds beside other folds", "all_folds alone", "leave the others out"))
    if request.resume and request.overwrite:
        problems.append(Problem("--resume and --overwrite together", "one of them", "leave one out"))
    if request.initial_weights is not None and not request.initial_weights.exists():
        expected = "a checkpoint, or the folder of a run"
        problems.append(Problem("--init names no file", expected, "check the path", file=request.initial_weights))
    if problems:
        raise InvalidInput(problems)


def check_needs(setup: RunSetup) -> None:
    """Raises where the method needs what data set, plan or fold do not have."""
    needs, plan, name = setup.method.needs, setup.configuration, setup.method.name
    problems = []
    if plan.dims not in needs.dims:
        dims = " or ".join(f"{d}D" for d in needs.dims)
        problems.append(
            Problem(
                f"{setup.request.configuration} is {plan.dims}D", f"{dims}, which {name} needs", "choose another method"
            )
        )
    if needs.softmax_only and setup.schema.has_regions:
        problems.append(Problem("the labels are regions", f"plain labels, which {name} needs", "choose another method"))
    if needs.modalities > plan.n_channels:
        problems.append(
            Problem(
                f"the images have {plan.n_channels} channel(s)",
                f"at least {needs.modalities}, which {name} needs",
                "choose another method",
            )
        )
    levels = len(plan.architecture.cumulative_strides) - 1
    if needs.levels > levels:
        problems.append(
            Problem(
                f"the plan's network has {levels} level(s) of deep supervision",
                f"at least {needs.levels}, which {name} needs",
                "choose another method, or a plan with a larger patch",
            )
        )
    if setup.method.needs_initial_weights(setup.settings) and setup.request.initial_weights is None:
        found = f"these settings of {name} begin with a trained network"
        fix = "name a trained run with --init, or leave out the setting"
        problems.append(Problem(found, "its weights", fix))
    for fold, cases in setup.folds.items():
        if not cases.labeled:
            problems.append(
                Problem(f"fold {fold} has no labeled training case", "at least one", "choose another fold or budget")
            )
    if not problems:  # the same for all folds, or of one: said once
        refused = [setup.method.refusals(setup.job(fold, 1), setup.settings) for fold in setup.folds]
        problems = list({str(problem): problem for of_fold in refused for problem in of_fold}.values())
    if problems:
        raise InvalidInput(problems)


def check_planned_since(raw: RawDataset, fingerprint: Fingerprint, plans: Plans) -> None:
    """Raises where labels came after the data set was planned: nothing is known of them yet."""
    known = fingerprint.of_pool("labeled")
    new = [case.id for case in raw.labeled if case.id not in known]
    if new:
        shown = ", ".join(new[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
        raise InvalidInput(
            Problem(
                f"{len(new)} labeled cases came after {raw.name} was planned: {shown}",
                "a fingerprint that knows them",
                f"run autossl_plan_and_preprocess -d {raw.name} --preset {plans.preset}: it adds what is new",
            )
        )
