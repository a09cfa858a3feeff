"""Finds postprocessing rules for runs that have finished their folds, from their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from autossl.data.geometry import Geometry
from autossl.data.image_io import read_geometry, read_label
from autossl.data.integrity import remap_label_map
from autossl.data.labels import LabelSchema
from autossl.data.parallel import parallel_map
from autossl.data.probabilities import labels_of, mean_of
from autossl.data.problems import InvalidInput, Problem
from autossl.data.runs import FoundRun, RunFilter, choose_run, read_run
from autossl.data.workspace import Workspace
from autossl.evaluation.label_schemas import labels_of_dataset
from autossl.evaluation.out_of_fold import OutOfFoldCase, collect
from autossl.evaluation.postprocessing import HeldCase, SearchOptions, find_rules
from autossl.evaluation.postprocessing_folder import undeclared_labels
from autossl.inference.inference_plan import choose_inference_plan, read_inference_plan, set_postprocessing
from autossl.inference.postprocess import LabelMap
from autossl.inference.postprocessing_plan import POSTPROCESSING_FILE, PostprocessingPlan, write_postprocessing

Progress = Callable[[str, int, int], None]
"""(part of the work, done, total)."""


@dataclass(frozen=True)
class PooledCase:
    """A labeled case as networks segmented it that had not seen its label."""

    case: str
    patient: str
    label_map: Path
    """Of the first run; says on which grid the probabilities lie."""
    probabilities: tuple[Path, ...]
    """Of several runs, whose mean decides; empty: `label_map` is the prediction."""
    reference: Path


def pool(workspace: Workspace, dataset: str, runs: Sequence[FoundRun]) -> list[PooledCase]:
    """The out-of-fold cases of a run, or those of several runs that are to be averaged.

    Raises:
        InvalidInput: no run, runs of several splits, unfinished folds, or probabilities that were not saved.
    """
    if len({run.spec.split for run in runs}) != 1:
        listed = ", ".join(str(run.folder) for run in runs) or "no run"
        raise InvalidInput(Problem(listed, "one run, or several of one split", "name other runs"))
    first, *others = [{case.case: case for case in collect(workspace, dataset, run)} for run in runs]
    if not others:
        return [PooledCase(case.case, case.patient, case.label_map, (), case.reference) for case in first.values()]
    members = {case: [first[case], *(other[case] for other in others if case in other)] for case in first}
    missing = [
        Problem(
            f"no probabilities of {run.folder.name}",
            "those of every run, to be averaged",
            "run autossl_find_best_configuration: it predicts what is missing without training",
            case=case,
            file=run.folder,
        )
        for number, run in enumerate(runs)
        for case, own in members.items()
        if len(own) == len(runs) and own[number].probabilities is None
    ]
    if missing:
        raise InvalidInput(missing)
    shared = [_averaged(own) for own in members.values() if len(own) == len(runs)]
    if not shared:
        raise InvalidInput(Problem("no case that all runs validated", "runs of one split", "name other runs"))
    return shared


def find_postprocessing(
    workspace: Workspace,
    dataset: str,
    runs: Sequence[FoundRun],
    options: SearchOptions | None = None,
    progress: Progress | None = None,
) -> PostprocessingPlan:
    """The rules that the pooled folds of a run speak for, or of several whose probabilities are averaged.

    Args:
        workspace: with the raw dataset and the runs.
        dataset: its full name.
        runs: all folds finished; several need the probabilities of their validation cases.
        options: how rules are judged; also the number of processes.
        progress: told of "cases" (read) and "rules" (tried).

    Raises:
        InvalidInput: as `pool`; or label maps that cannot be read, lie on another grid or hold undeclared values: all.
    """
    options = options or SearchOptions()
    schema, remap = labels_of_dataset(dataset, workspace.root)
    cases = pool(workspace, dataset, runs)
    hold, held, problems = partial(_hold, schema=schema, remap=remap), [], []
    for number, result in enumerate(parallel_map(hold, cases, options.n_workers, name_of=lambda c: c.case), start=1):
        if isinstance(result, HeldCase):
            held.append(result)
        else:
            problems += result
        if progress is not None:
            progress("cases", number, len(cases))
    if problems:
        raise InvalidInput(problems)
    found = find_rules(
        held,
        [case.patient for case in cases],
        schema,
        options,
        names=[case.case for case in cases],
        progress=None if progress is None else partial(progress, "rules"),
    )
    predicted = {"dataset": dataset, "split": runs[0].spec.split, "runs": [_relative(run, workspace) for run in runs]}
    return found.model_copy(update={"found_on": {**predicted, **found.found_on}})


def find_postprocessing_of_plan(
    workspace: Workspace,
    inference_plan: Path,
    options: SearchOptions | None = None,
    progress: Progress | None = None,
) -> PostprocessingPlan:
    """Finds the rules for the final model of a split, writes postprocessing.json beside its plan and puts them into it.

    Raises:
        InvalidInput: as `find_postprocessing`, or the inference plan cannot be used.
    """
    plan = read_inference_plan(inference_plan)
    folders = [workspace.results / member.run for member in plan.members]
    runs = [FoundRun(folder, read_run(folder)) for folder in folders]
    found = find_postprocessing(workspace, plan.dataset, runs, options, progress)
    write_postprocessing(Path(inference_plan).parent / POSTPROCESSING_FILE, found)
    set_postprocessing(inference_plan, found.rules)
    return found


def find_and_write(
    workspace: Workspace,
    dataset: str,
    wanted: RunFilter,
    output: Path | None = None,
    options: SearchOptions | None = None,
    progress: Progress | None = None,
) -> tuple[PostprocessingPlan, Path]:
    """For the inference plan of a request that says at most which split, else for the only run that fits.

    Args:
        workspace: with everything.
        dataset: its full name.
        wanted: which split, or which run.
        output: where the rules of a run are written; those of an inference plan have their place beside it.
        options: how rules are judged.
        progress: as in `find_postprocessing`.

    Returns:
        What was found, and the file that holds it.

    Raises:
        InvalidInput: `output` is missing for a run or given for a plan; as `choose_inference_plan`, `choose_run`,
            `find_postprocessing`.
    """
    plan_path = choose_inference_plan(workspace, dataset, wanted)
    if plan_path is not None:
        path = plan_path.parent / POSTPROCESSING_FILE
        if output is not None:
            fix = f"leave out -o, and find the rules in {path}; or name a run with -c -m --preset --seed --tag"
            raise InvalidInput(Problem("-o for the rules of an inference plan", "-o for those of a run", fix))
        return find_postprocessing_of_plan(workspace, plan_path, options, progress), path
    run = choose_run(workspace, dataset, wanted)
    if output is None:
        fix = "say where with -o, or make an inference plan with autossl_find_best_configuration and name no run"
        raise InvalidInput(Problem(f"no file for the rules of {run.folder.name}", "-o FILE", fix))
    found = find_postprocessing(workspace, dataset, [run], options, progress)
    write_postprocessing(output, found)
    return found, output


def _averaged(own: Sequence[OutOfFoldCase]) -> PooledCase:
    paths = tuple(case.probabilities for case in own if case.probabilities is not None)
    return PooledCase(own[0].case, own[0].patient, own[0].label_map, paths, own[0].reference)


def _relative(run: FoundRun, workspace: Workspace) -> str:
    folder = run.folder.resolve()
    return folder.relative_to(workspace.results.resolve()).as_posix()


def _hold(case: PooledCase, schema: LabelSchema, remap: Mapping[int, int]) -> HeldCase | list[Problem]:
    """Reads a case; or all that keeps it from being used."""
    try:
        reference, spacing, geometry = read_label(case.reference, "native")
        prediction, own = _prediction(case, schema)
    except InvalidInput as error:
        return [replace(problem, case=case.case) for problem in error.problems]
    reference = remap_label_map(reference, remap)
    problems = [
        *undeclared_labels(prediction, schema, case.label_map),
        *undeclared_labels(reference, schema, case.reference),
    ]
    differences = own.differences(geometry)
    if differences or prediction.shape != reference.shape:
        found = f"another grid than its reference: {'; '.join(differences) or prediction.shape}"
        problems.append(Problem(found, f"the grid of {case.reference}", "predict the case again", file=case.label_map))
    if problems:
        return [replace(problem, case=case.case) for problem in problems]
    return HeldCase.of(prediction, reference, spacing)


def _prediction(case: PooledCase, schema: LabelSchema) -> tuple[LabelMap, Geometry]:
    if not case.probabilities:
        label_map, _, geometry = read_label(case.label_map, "native")
        return label_map, geometry
    slabs = [labels_of(slab, schema) for slab in mean_of(case.probabilities)]
    return np.concatenate(slabs), read_geometry(case.label_map, "native")
