"""postprocessing.json: the rules that were kept, what speaks for each, and what spoke against the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from autossl.data.files import read_json, write_json
from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput, Problem, schema_faults
from autossl.data.provenance import Written
from autossl.data.workspace import Workspace
from autossl.inference.postprocess import Rule

POSTPROCESSING_FILE = "postprocessing.json"
SCORING = "mean over classes of the mean over cases; a class that is absent in prediction and reference counts 1"


class _Schema(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Trial(_Schema):
    """A rule that was tried, and why it was kept or not."""

    rule: Rule
    kept: bool
    because: str
    gain: float
    """Mean paired difference of the Dice (0 to 1), see `SCORING`."""
    low: float | None = None
    high: float | None = None
    """`low` and `high` bound the interval of the gain; None where it was not needed for the decision."""
    class_gains: dict[str, float] = {}
    n_cases_changed: int = 0


class CaseDice(_Schema):
    """Of one class in one case; a class that is absent in prediction and reference counts 1."""

    before: float
    after: float


class PostprocessingPlan(_Schema):
    """What postprocessing.json holds."""

    rules: tuple[Rule, ...]
    """Those that were kept, in the order in which they are applied."""
    found_on: dict[str, Any] = {}
    """n_cases, n_patients, and what was predicted with what (dataset, split, runs)."""
    why: tuple[Trial, ...] = ()
    """Every rule that was tried, in order."""
    scoring: str = SCORING
    labels: dict[str, tuple[int, ...]] | None = None
    """Of the dataset that the rules were found on; None in a file written by hand."""
    regions_class_order: tuple[int, ...] | None = None
    cases: dict[str, dict[str, CaseDice]] = {}
    """Case → class → Dice without and with all of the rules."""
    written: Written | None = None

    @property
    def label_schema(self) -> LabelSchema | None:
        """What the label values mean; None where the file does not say."""
        return None if self.labels is None else LabelSchema(self.labels, self.regions_class_order)


def postprocessing_path(workspace: Workspace, dataset: str, split: str) -> Path:
    """results/<dataset>/<split>/postprocessing.json."""
    return workspace.results_folder(dataset) / split / POSTPROCESSING_FILE


def write_postprocessing(path: Path, plan: PostprocessingPlan) -> None:
    """Atomically."""
    write_json(path, plan.model_dump(mode="json"))


def read_postprocessing(path: Path) -> PostprocessingPlan:
    """Reads and checks postprocessing.json; of a file written by hand {"rules": [...]} is enough.

    Raises:
        InvalidInput: it is missing, cut off or makes no sense; with every fault.
    """
    content = read_json(path)
    try:
        return PostprocessingPlan.model_validate(content)
    except ValidationError as error:
        wanted = 'rules like {"kind": "keep_largest", "class_name": "liver"}; see the page on postprocessing'
        fix = "correct the file, or find rules again with autossl_find_postprocessing"
        raise InvalidInput([Problem(fault, wanted, fix, file=path) for fault in schema_faults(error)]) from error
