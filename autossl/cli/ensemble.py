"""`autossl_ensemble`: averages the probabilities of several prediction folders."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

EPILOG = """\
For models that no inference plan joins; autossl_predict -d DATASET averages the runs of an inference plan by itself.
No postprocessing is applied (autossl_apply_postprocessing).

example:
  autossl_predict -i IMAGES -o A -d 4 -c 2d -m supervised --save_probabilities
  autossl_predict -i IMAGES -o B -d 4 -c 3d_fullres -m supervised --save_probabilities
  autossl_ensemble -i A B -o SEGMENTATIONS"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _ensemble, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_ensemble", EPILOG)
    parser.add_argument(
        "-i",
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="two or more folders of autossl_predict --save_probabilities",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where results are written")
    parser.add_argument("--save_probabilities", action="store_true", help="write probabilities/CASE.b2nd as well")
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there")
    return parser


def _ensemble(arguments: argparse.Namespace) -> None:
    from autossl.inference.ensemble_folders import EnsembleRequest, ensemble_folders

    request = EnsembleRequest(
        tuple(arguments.input), arguments.output, arguments.save_probabilities, arguments.overwrite
    )
    with CommandProgress(arguments.quiet) as progress:
        cases = ensemble_folders(request, progress.part("cases"))
    print(f"{len(cases)} cases of {len(arguments.input)} folders averaged: {arguments.output}")
