"""`autossl_apply_postprocessing`: tidies a folder of label maps by rules."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autossl.cli.options import add_workers, add_workspace
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.evaluation.postprocessing_folder import ApplyRequest

EPILOG = """\
Names, types and geometry of the files stay exactly as they are; the input folder is not touched.
autossl_predict applies the rules of an inference plan itself: this is for other label maps, and for other rules.
Of a file written by hand {"rules": [{"kind": "keep_largest", "class_name": "liver"}]} is enough.

example: autossl_apply_postprocessing -i SEGMENTATIONS -o TIDIED -d 4"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _apply, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_apply_postprocessing", EPILOG)
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="FOLDER", help="label maps")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where results are written")
    parser.add_argument(
        "-d", "--dataset", metavar="DATASET", help="whose labels these are, and whose rules without --postprocessing"
    )
    parser.add_argument(
        "--postprocessing", type=Path, metavar="FILE", help="postprocessing.json (default: the only one of the dataset)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there")
    add_workers(parser, "read, tidy and write")
    add_workspace(parser)
    return parser


def _apply(arguments: argparse.Namespace) -> None:
    from autossl.evaluation.postprocessing_folder import apply_to_folder

    request = _request(arguments)
    with CommandProgress(arguments.quiet) as progress:
        result = apply_to_folder(request, progress.part("cases"))
    for rule in request.plan.rules:
        print(f"rule: {rule}")
    print(f"{len(result.changed)} of {len(result.cases)} label maps changed: {request.output}")


def _request(arguments: argparse.Namespace) -> ApplyRequest:
    from autossl.evaluation.postprocessing_folder import ApplyRequest, find_plan_and_labels

    plan, schema = find_plan_and_labels(
        arguments.input, arguments.postprocessing, arguments.dataset, arguments.workspace
    )
    workers = arguments.num_processes
    return ApplyRequest(arguments.input, arguments.output, plan, schema, arguments.overwrite, workers)
