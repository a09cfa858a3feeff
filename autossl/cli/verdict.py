"""`autossl_verdict`: judges from finished runs whether the unlabeled cases helped."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autossl.cli.options import add_workspace, label_budget, non_negative
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.evaluation.judge_runs import VerdictRecord
    from autossl.evaluation.verdict import Figure

EPILOG = """\
Compares the out-of-fold Dice of each finished run with that of its supervised twin (same configuration, preset, steps
and seed). Of several the one with the highest mean Dice is judged, and the interval contains the choosing.

example: autossl_verdict Hippocampus"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _verdict, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_verdict", EPILOG)
    parser.add_argument("dataset", metavar="DATASET", help="4, 004, Name or Dataset004_Name")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--split", metavar="NAME", help="whose runs are judged (default: default)")
    which.add_argument("--labeled", type=label_budget, metavar="N", help="the deployment split with N labeled cases")
    parser.add_argument("--draw", type=non_negative, default=0, metavar="D", help="of --labeled (default: 0)")
    parser.add_argument("-c", "--configurations", nargs="+", metavar="C", help="only these (default: all)")
    parser.add_argument("-m", "--methods", nargs="+", metavar="M", help="only these and supervised (default: all)")
    parser.add_argument("--preset", nargs="+", metavar="P", help="only these (default: all)")
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="only these run folders (default: all)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: results/DATASET/SPLIT/verdict.json")
    add_workspace(parser)
    return parser


def _verdict(arguments: argparse.Namespace) -> None:
    from autossl.data.splits import split_name
    from autossl.data.workspace import Workspace
    from autossl.evaluation.judge_runs import VERDICT_FILE, Competitors, judge_runs

    workspace = Workspace.locate(arguments.workspace)
    dataset = workspace.find_dataset(arguments.dataset)
    split = arguments.split or split_name("deployment", arguments.labeled, arguments.draw)
    competitors = Competitors(arguments.configurations, arguments.preset, arguments.methods, arguments.runs)
    record = judge_runs(workspace, dataset, split, competitors, output=arguments.output)
    _print(record)
    print(f"\nall figures: {arguments.output or workspace.results_folder(dataset) / split / VERDICT_FILE}")


def _print(record: VerdictRecord) -> None:
    from autossl.cli.tables import print_table

    columns = ["Dice points", "difference", "95 % interval", "patients", "wins / ties / losses", "verdict"]
    rows = [[name, *_cells(figure)] for name, figure in [("all classes", record), *record.per_class.items()]]
    print(record.sentence)
    print_table(columns, rows)
    beside = [*record.comparisons, *([record.equal_time] if record.equal_time else [])]
    lines = [[f"{c.name} against {c.against}", *_cells(c)[:-1], _p(c.p_wilcoxon), _p(c.p_holm)] for c in beside]
    print_table([*columns[:-1], "Wilcoxon p", "p (Holm)"], lines)
    for note in [*record.notes, *(f"Left out: {text}." for text in record.left_out)]:
        print(note)


def _cells(figure: Figure) -> list[str]:
    numbers = [_points(figure.estimate), f"{_points(figure.low)} to {_points(figure.high)}", str(figure.n_patients)]
    return [*numbers, f"{figure.wins} / {figure.ties} / {figure.losses}", figure.word]


def _points(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:+.2f}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
