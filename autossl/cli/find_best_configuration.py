"""`autossl_find_best_configuration`: chooses the final model of a split and writes its inference plan."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autossl.cli.options import add_device, add_workers, add_workspace, budget_or_all, non_negative
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.evaluation.selection.selection import Selection, SelectionOptions

EPILOG = """\
Ranks all runs with all folds finished, and the ensembles of every pair, by their Dice on the pooled out-of-fold cases.
An ensemble is taken where the interval of its difference to the best single model lies above zero, or with --ensemble.
Where verdict.json says anything but 'helped', the final model is supervised unless -m names a method.
Probabilities that training did not save are predicted first; --no_ensemble does without them.

example: autossl_find_best_configuration 4
then:    autossl_predict -i IMAGES -o SEGMENTATIONS -d 4"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _find, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_find_best_configuration", EPILOG)
    parser.add_argument("dataset", metavar="DATASET", help="4, 004, Dataset004_Hippocampus or Hippocampus")
    parser.add_argument(
        "--labeled", metavar="N", type=budget_or_all, help="deployment budget of the runs; 'all' for those without one"
    )
    parser.add_argument("--draw", type=non_negative, default=0, metavar="D", help="its draw of labels (default: 0)")
    parser.add_argument(
        "-m", "--method", nargs="+", default=(), metavar="METHOD", help="the final model is to be of these methods"
    )
    ensemble = parser.add_mutually_exclusive_group()
    ensemble.add_argument("--ensemble", action="store_true", help="take the best ensemble, whatever its interval")
    ensemble.add_argument("--no_ensemble", action="store_true", help="choose among single models only")
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="choose from these run folders only")
    add_workers(parser, "score ensembles")
    add_device(parser)
    add_workspace(parser)
    return parser


def _find(arguments: argparse.Namespace) -> None:
    from autossl.data.workspace import Workspace
    from autossl.evaluation.selection.selection import find_best_configuration

    workspace = Workspace.locate(arguments.workspace)
    dataset = workspace.find_dataset(arguments.dataset)
    with CommandProgress(arguments.quiet) as progress:
        selection = find_best_configuration(workspace, dataset, _options(arguments), progress.update)
    _print_selection(selection)


def _options(arguments: argparse.Namespace) -> SelectionOptions:
    from autossl.data.splits import split_name
    from autossl.evaluation.selection.choose import Wish
    from autossl.evaluation.selection.selection import SelectionOptions

    split = None
    if arguments.labeled is not None:
        budget = None if arguments.labeled == "all" else arguments.labeled
        split = split_name("deployment", budget, arguments.draw)
    return SelectionOptions(
        split=split,
        runs=tuple(arguments.runs) if arguments.runs else None,
        wish=Wish(tuple(arguments.method), True if arguments.ensemble else False if arguments.no_ensemble else None),
        device=arguments.device,
        n_workers=arguments.num_processes,
    )


def _print_selection(selection: Selection) -> None:
    from autossl.cli.tables import print_table

    rows = []
    for ranked in selection.choice.ranked:
        interval = ranked.interval
        figures = [f"{100 * value:.2f}" for value in (interval.observed, interval.low, interval.high)]
        rows.append([ranked.candidate.name, figures[0], f"{figures[1]} to {figures[2]}"])
    n_cases = len(selection.scored.cases)
    print_table(["candidate", "Dice", "95 % interval"], rows, title=f"pooled out-of-fold Dice, {n_cases} cases")
    for name, why in selection.scored.left_out.items():
        print(f"left out: {name}: {why}")
    print(selection.choice.why)
    for member in selection.plan.members:
        print(f"run: {member.run}, fold {', '.join(member.folds)}")
    print(f"inference plan: {selection.path}")
