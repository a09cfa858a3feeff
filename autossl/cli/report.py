"""`autossl_report`: writes the report of a split, or checks the one that is there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from autossl.cli.options import add_workspace
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

EPILOG = """\
One HTML file that holds everything, to be opened without a network: verdict, scores, cases as pictures, final model,
data, plan, training, what to label next, and how to repeat it. What is not there yet is said to be so.

--check writes nothing: every number of the page is looked up again in the file it names, figures are drawn again, label
maps are scored again, the verdict is judged again, and the candidates for the final model are ranked again. What
differs is listed, with exit code 2.

example: autossl_report 4"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _report, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_report", EPILOG)
    parser.add_argument("dataset", metavar="DATASET", help="number or name (4, Hippocampus)")
    parser.add_argument(
        "--split", metavar="S", help="default, deployment-20_draw-0, … (default: the only one with results)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the page (default: report.html beside the split's runs)"
    )
    parser.add_argument("--check", action="store_true", help="compare the page that is there with the files")
    add_workspace(parser)
    return parser


def _report(arguments: argparse.Namespace) -> None:
    from autossl.data.workspace import Workspace

    workspace = Workspace.locate(arguments.workspace)
    dataset = workspace.find_dataset(arguments.dataset)
    with CommandProgress(arguments.quiet) as progress:
        if arguments.check:
            _check(workspace.root, dataset, arguments, progress)
            return
        from autossl.evaluation.report.report import write_report

        print(write_report(workspace, dataset, arguments.split, arguments.output, progress.update))


def _check(root: Path, dataset: str, arguments: argparse.Namespace, progress: CommandProgress) -> None:
    from autossl.data.problems import InvalidInput
    from autossl.data.workspace import Workspace
    from autossl.evaluation.report.check import check_report

    found = check_report(Workspace(root), dataset, arguments.split, arguments.output, progress.update)
    what = f"{found.n_values} values, {found.n_figures} figures, {found.n_scores} scores of cases"
    what += f", {found.n_candidates} candidates for the final model" if found.n_candidates else ""
    what += ", and the verdict" if found.verdict else ""
    if found.differences:
        raise InvalidInput(found.differences, title=f"{found.page}: {len(found.differences)} of {what} differ:")
    print(f"{found.page}: {what} agree with the files")
