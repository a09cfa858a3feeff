"""`autossl_find_postprocessing`: finds the postprocessing rules that the pooled folds speak for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autossl.cli.options import add_run_filter, add_workers, add_workspace
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.inference.postprocessing_plan import PostprocessingPlan

EPILOG = """\
Tried in this order: the largest component of all foreground, then of each class its largest component, a smallest
size, and the filling of holes. A rule is kept where it raises the mean Dice of the labeled cases, each predicted by
the fold that had not seen it, and lowers no class beyond noise. With fewer than 8 patients none is kept.

With -d alone the rules are found for the inference plan and put into it, for autossl_predict to apply. With options
that name a run they are found for that run, and nothing but the file -o is written.

example: autossl_find_postprocessing -d 4"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _find, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_find_postprocessing", EPILOG)
    parser.add_argument("-d", "--dataset", required=True, metavar="DATASET", help="number or name (4, Hippocampus)")
    add_run_filter(parser, "which split or run of the dataset")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="for a run: where its rules are written, as JSON"
    )
    add_workers(parser, "read and tidy")
    add_workspace(parser)
    return parser


def _find(arguments: argparse.Namespace) -> None:
    from autossl.data.runs import RunFilter
    from autossl.data.workspace import Workspace
    from autossl.evaluation.postprocessing import SearchOptions
    from autossl.evaluation.postprocessing_runs import find_and_write

    wanted = RunFilter(
        configuration=arguments.configuration,
        preset=arguments.preset,
        method=arguments.method,
        labeled=arguments.labeled,
        draw=arguments.draw,
        seed=arguments.seed,
        tag=arguments.tag,
    )
    options = SearchOptions(n_workers=arguments.num_processes)
    workspace = Workspace.locate(arguments.workspace)
    with CommandProgress(arguments.quiet) as progress:
        found, path = find_and_write(
            workspace, workspace.find_dataset(arguments.dataset), wanted, arguments.output, options, progress.update
        )
    _print(found)
    print(f"every rule and case: {path}")


def _print(found: PostprocessingPlan) -> None:
    from autossl.cli.tables import print_table

    rows = [[str(trial.rule), "kept" if trial.kept else "-", trial.because] for trial in found.why]
    facts = found.found_on
    title = f"rules tried on {facts['n_cases']} cases of {facts['n_patients']} patients (Dice in points)"
    print_table(["rule", "", "because"], rows, title=title)
