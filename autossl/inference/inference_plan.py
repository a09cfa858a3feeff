"""inference_plan.json: which runs predict together, how, and why; read by `autossl_predict -d DATASET`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autossl.data.files import read_json, write_json
from autossl.data.problems import InvalidInput, Problem, schema_faults
from autossl.data.provenance import Written
from autossl.data.runs import RunFilter, find_runs
from autossl.data.workspace import Workspace
from autossl.inference.postprocess import Rule

INFERENCE_PLAN_FILE = "inference_plan.json"
MAKE_ONE = "autossl_find_best_configuration"


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlanMember(_Schema):
    """A run and its folds; their logits are averaged first."""

    run: str
    """Its folder relative to results/, with '/': `Dataset004_Hippocampus/default/2d__nano__supervised__seed-0`."""
    folds: tuple[str, ...] = Field(min_length=1)
    total_steps: int | None = None
    """Of the run when it was chosen; None: not known. One that was extended since is another model."""

    @field_validator("run")
    @classmethod
    def _stays_inside(cls, run: str) -> str:
        if PurePosixPath(run).is_absolute() or ".." in PurePosixPath(run).parts or "\\" in run or not run.strip("./"):
            raise ValueError("must be a folder below results/, relative to it")
        return run

    @property
    def name(self) -> str:
        """The run folder's own name."""
        return PurePosixPath(self.run).name


class LabelBudget(_Schema):
    """What the members have seen of labels, all folds together."""

    n_cases: int
    n_patients: int


class InferencePlan(_Schema):
    """The final model of a split. Label maps come from the members' probabilities, then the rules are applied."""

    dataset: str
    split: str
    members: tuple[PlanMember, ...] = Field(min_length=1)
    combine: Literal["single", "mean_probabilities"]
    """"single": one member, its logits decide; "mean_probabilities": the mean of the members' probabilities does."""
    postprocessing: tuple[Rule, ...] = ()
    """Applied to the label maps, in this order."""
    why: str
    """In sentences, for the user."""
    labels: LabelBudget
    dice: float | None = None
    """Pooled foreground Dice of these members on the out-of-fold cases, before postprocessing; see selection.json."""
    written: Written

    @model_validator(mode="after")
    def _fits_together(self) -> InferencePlan:
        if (self.combine == "single") != (len(self.members) == 1):
            raise ValueError(f"{len(self.members)} members cannot be combined as '{self.combine}'")
        return self


def inference_plan_path(workspace: Workspace, dataset: str, split: str) -> Path:
    """results/<dataset>/<split>/inference_plan.json."""
    return workspace.results_folder(dataset) / split / INFERENCE_PLAN_FILE


def workspace_of_plan(path: Path) -> Workspace:
    """The workspace whose results/DATASET/SPLIT/ holds the plan.

    Raises:
        InvalidInput: the plan lies elsewhere, where its members cannot be found.
    """
    folder = (path.resolve() if ".." in path.parts else path.absolute()).parent
    if len(folder.parts) < 5 or folder.parents[1].name != "results":
        expected = "a folder results/DATASET/SPLIT of a workspace, with the runs that the plan names"
        fix = "put the folder back, or name one of its run folders"
        raise InvalidInput(Problem("the inference plan lies outside of a workspace", expected, fix, file=path))
    return Workspace(folder.parents[2])


def write_inference_plan(path: Path, plan: InferencePlan) -> None:
    """Atomically."""
    write_json(path, plan.model_dump(mode="json"))


def read_inference_plan(path: Path) -> InferencePlan:
    """Reads and checks an inference plan.

    Raises:
        InvalidInput: it is missing, cut off or makes no sense.
    """
    content = read_json(path)
    try:
        return InferencePlan.model_validate(content)
    except ValidationError as error:
        faults = "; ".join(schema_faults(error, "it"))
        wanted = f"an inference plan as {MAKE_ONE} writes it"
        raise InvalidInput(Problem(faults, wanted, f"make it again with {MAKE_ONE}", file=path)) from error


def set_postprocessing(path: Path, rules: Sequence[Rule]) -> InferencePlan:
    """Puts rules into an inference plan, in place of those it has; the file is written where that changes it.

    Raises:
        InvalidInput: as `read_inference_plan`.
    """
    plan = read_inference_plan(path)
    if plan.postprocessing != tuple(rules):
        plan = plan.model_copy(update={"postprocessing": tuple(rules), "written": Written.now()})
        write_inference_plan(path, plan)
    return plan


def choose_inference_plan(workspace: Workspace, dataset: str, wanted: RunFilter) -> Path | None:
    """The inference plan of a request that says at most which split.

    Returns:
        None where the request chooses among runs, or there is no plan and no more than one run to choose from.

    Raises:
        InvalidInput: several plans fit, with the list; or none, and several runs.
    """
    if replace(wanted, labeled=None, draw=None, split=None) != RunFilter():
        return None
    plans = sorted(workspace.results_folder(dataset).glob(f"*/{INFERENCE_PLAN_FILE}"))
    fitting = [path for path in plans if wanted.accepts_split(path.parent.name)]
    if len(fitting) > 1:
        listed = "".join(f"\n    {path}" for path in fitting)
        found, expected = f"{len(fitting)} inference plans of {dataset} fit ({wanted}):{listed}\n  ", "exactly one"
        raise InvalidInput(Problem(found, expected, "say which with --labeled and --draw ('--labeled all': no budget)"))
    if fitting:
        return fitting[0]
    runs = find_runs(workspace, dataset, wanted)
    if len(runs) > 1:
        listed = "".join(f"\n    {run}" for run in runs)
        found = f"no inference plan of {dataset} fits, and {len(runs)} runs do ({wanted}):{listed}\n  "
        fix = f"make a plan of a split with {MAKE_ONE}, or name a run with -c -m --preset --labeled --draw --seed --tag"
        raise InvalidInput(Problem(found, "an inference plan, or exactly one run", fix))
    return None
