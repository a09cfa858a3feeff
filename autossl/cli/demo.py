"""`autossl_demo`: runs everything on a small made-up data set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autossl.cli.options import add_device
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.demo import DemoResult

EPILOG = """\
Makes a few labeled, more unlabeled and some test cases, plans, trains supervised and mean_teacher at the same number of
steps, predicts the test cases, scores them and draws some. At most 5 minutes on 2 CPU cores."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _demo, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_demo", EPILOG)
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("autossl_demo"),
        metavar="FOLDER",
        help="where everything is written (default: autossl_demo); an unfinished demo goes on",
    )
    add_device(parser)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from autossl.demo import DemoSettings, run_demo

    with CommandProgress(arguments.quiet) as progress:
        result = run_demo(arguments.folder, DemoSettings(device=arguments.device), progress.update)
    _print_result(result)


def _print_result(result: DemoResult) -> None:
    from autossl.cli.tables import figure, print_table

    evaluations = result.evaluations
    first = next(iter(evaluations.values()))
    rows = [
        [
            method,
            *(figure(evaluation.class_summary(name).means["dice"]) for name in evaluation.class_names),
            figure(evaluation.foreground_mean["dice"]),
        ]
        for method, evaluation in evaluations.items()
    ]
    print_table(["method", *first.class_names, "mean"], rows, title=f"Dice on {len(first.cases)} test cases")
    print(f"pictures: {result.picture}")
    for method, run in result.runs.items():
        print(f"run of {method}: {run}")
    print(
        f"done in {result.seconds:.0f} s. A demonstration with made-up data, one fold and a short training:\n"
        "the difference between the two methods says nothing about your data."
    )
