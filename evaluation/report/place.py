"""Where the files of a split lie, and its runs with short names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from autossl.data.problems import InvalidInput, Problem
from autossl.data.runs import FoundRun, RunFilter, find_runs
from autossl.data.workspace import Workspace
from autossl.evaluation.report.sources import Files
from autossl.inference.model_folder import BENCHMARK_PREFIX

VERDICT, PLAN, SELECTION = "verdict.json", "inference_plan.json", "selection.json"
POSTPROCESSING, LABEL_NEXT, HIDDEN_TEST = "postprocessing.json", "label_next.json", "hidden_test.json"
EXPERIMENT, OUT_OF_FOLD = "experiment.json", "out_of_fold.json"
RESULT_FILES = (
    EXPERIMENT,
    OUT_OF_FOLD,
    VERDICT,
    SELECTION,
    PLAN,
    POSTPROCESSING,
    HIDDEN_TEST,
    LABEL_NEXT,
)
SUMMARIES = "fold_*/validation/summary.json"
LOGS = "fold_*/log.jsonl"


@dataclass(frozen=True)
class Place:
    """A split of a dataset in a workspace, with everything that was read of it so far."""

    workspace: Workspace
    dataset: str
    split: str

    @cached_property
    def files(self) -> Files:
        """Read once."""
        return Files(self.workspace.root)

    @cached_property
    def runs(self) -> tuple[FoundRun, ...]:
        """Of the split, by folder name."""
        return tuple(find_runs(self.workspace, self.dataset, RunFilter(split=self.split)))

    def result(self, name: str) -> str:
        """A file of the split's results, as sources name it."""
        return f"results/{self.dataset}/{self.split}/{name}"

    def preprocessed(self, name: str) -> str:
        """A file of the preprocessed folder, as sources name it."""
        return f"preprocessed/{self.dataset}/{name}"

    def of_run(self, run: FoundRun, name: str) -> str:
        """A file of a run, as sources name it."""
        return f"{self.files.relative(run.folder)}/{name}"

    @cached_property
    def names(self) -> dict[str, str]:
        """Run folder → what sets it apart from the others."""
        return short_names([run.folder.name for run in self.runs])

    def named(self, name: str) -> str:
        """What stands for a run (its folder, its path below results/, several joined by ' + ') in short."""
        parts = [part.rsplit("/", 1)[-1] for part in name.split(" + ")]
        return " + ".join(self.names.get(part, part.replace("__", " ")) for part in parts)


def short_names(folders: Sequence[str]) -> dict[str, str]:
    """Folder names of runs → their method, and those of the other parts that differ among the runs."""
    split = {folder: folder.split("__") for folder in folders}
    usual = [parts for parts in split.values() if len(parts) >= 4]

    def differs(number: int) -> bool:
        return len({parts[number] for parts in usual}) > 1

    names = {}
    for folder, parts in split.items():
        if len(parts) < 4:
            names[folder] = folder
            continue
        tags = parts[3:-1]
        names[folder] = " ".join(
            [
                *([parts[0]] if differs(0) else []),
                *([parts[1]] if differs(1) else []),
                parts[2],
                *tags,
                *([parts[-1].replace("-", " ")] if differs(-1) else []),
            ]
        )
    return names


def choose_split(workspace: Workspace, dataset: str, split: str | None = None) -> str:
    """The split that was named, else the only one with results that is no benchmark's.

    Raises:
        InvalidInput: the named one has no run and no split file, or there are several.
    """
    there = _splits(workspace, dataset)
    planned = {path.stem for path in (workspace.preprocessed_folder(dataset) / "splits").glob("*.json")}
    if split is not None:
        if split in {*there, *planned}:
            return split
        listed = ", ".join(sorted({*there, *planned})) or "there is none"
        raise InvalidInput(Problem(f"no split '{split}' of {dataset}", f"one of: {listed}", "correct --split"))
    usual = [name for name in there if not name.startswith(BENCHMARK_PREFIX)]
    if len(usual) > 1:
        found = f"{len(usual)} splits of {dataset} have results: {', '.join(usual)}"
        raise InvalidInput(Problem(found, "one", "say which with --split"))
    return usual[0] if usual else "default"


def _splits(workspace: Workspace, dataset: str) -> list[str]:
    folder = workspace.results_folder(dataset)
    found = {path.parent.parent.name for path in folder.glob("*/*/run.json")}
    return sorted(found | {path.parent.name for name in (VERDICT, PLAN) for path in folder.glob(f"*/{name}")})
