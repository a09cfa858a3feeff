"""`autossl_label_next`: ranks the unlabeled cases that are worth labeling next."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autossl.cli.options import add_device, add_workspace, label_budget, non_negative, positive
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.evaluation.label_evidence import LabelNextRequest, LabelNextResult

EPILOG = """\
Every trained fold of the runs that fit predicts the unlabeled cases. A case comes first that resembles many on which
they disagree and in which there is much to outline, and which are unlike what is labeled or higher on the list.

Then label them, move their images from imagesUn to imagesTr, put the label maps into labelsTr, and go on:
  autossl_run 4 --tag round-2

example: autossl_label_next 4 -n 10"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _rank, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_label_next", EPILOG)
    parser.add_argument("dataset", metavar="DATASET", help="4, 004, Name or Dataset004_Name")
    parser.add_argument("-n", type=positive, default=10, metavar="N", help="how many cases (default: 10)")
    parser.add_argument("-c", "--configuration", metavar="C", help="runs of this configuration only")
    parser.add_argument("-m", "--methods", nargs="+", default=[], metavar="M", help="runs of these methods only")
    parser.add_argument("--preset", metavar="P", help="runs of this preset only")
    parser.add_argument("--tag", metavar="T", help="runs with this tag only ('' for those without)")
    parser.add_argument("--seed", type=non_negative, metavar="S", help="runs with this seed only")
    parser.add_argument("--labeled", type=label_budget, metavar="N", help="runs of this label budget")
    parser.add_argument("--draw", type=non_negative, metavar="D", help="runs of this draw of the labels")
    add_device(parser)
    add_workspace(parser)
    return parser


def _rank(arguments: argparse.Namespace) -> None:
    from autossl.evaluation.label_evidence import label_next

    with CommandProgress(arguments.quiet) as progress:
        result = label_next(_request(arguments), lambda what, done, total: progress.update(what, done, total))
    _print_result(result)


def _request(arguments: argparse.Namespace) -> LabelNextRequest:
    from autossl.data.runs import RunFilter
    from autossl.evaluation.label_evidence import LabelNextRequest

    return LabelNextRequest(
        dataset=arguments.dataset,
        n=arguments.n,
        workspace=arguments.workspace,
        runs=RunFilter(
            configuration=arguments.configuration,
            preset=arguments.preset,
            labeled=arguments.labeled,
            draw=arguments.draw,
            seed=arguments.seed,
            tag=arguments.tag,
        ),
        methods=tuple(arguments.methods),
        device=arguments.device,
    )


def _print_result(result: LabelNextResult) -> None:
    chosen = [case for case in result.ranked if case.rank is not None]
    networks = sum(len(folds) for folds in result.models.values())
    voters = f"{networks} networks of {len(result.models)} runs"
    print(f"{len(chosen)} of {len(result.ranked)} unlabeled cases, by {voters}:")
    for case in chosen:
        print(f"{case.rank:4}. {case.case}  ({case.score:.1%} of the need)")
        for reason in case.reasons:
            print(f"      {reason}")
    for name, why in result.left_out.items():
        print(f"left out: {name} ({why})")
    print(f"all candidates: {result.file}")
