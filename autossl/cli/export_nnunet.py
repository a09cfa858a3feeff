"""`autossl_export_nnunet`: writes a trained run as a model of nnU-Net v2."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autossl.cli.options import add_workspace, budget_or_all, fold_name, non_negative
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.interop.nnunet_export import NnunetExportRequest

EPILOG = """\
OUT is a folder of nnU-Net's results (nnUNet_results); in it the model lies in
DATASET/nnUNetTrainer__PLANS__CONFIGURATION. What predicts with several networks has no equal there: the message says
why, and which of them can go alone (--member).

examples: autossl_export_nnunet results/Dataset004_Hippocampus/default/2d__nano__mean_teacher__seed-0 nnunet_results
          autossl_export_nnunet Hippocampus nnunet_results --zip
          autossl_export_nnunet RUN_OF_CPS nnunet_results --member network_a"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _export, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_export_nnunet", EPILOG)
    parser.add_argument(
        "model", metavar="MODEL_FOLDER|DATASET", help="run folder, or a dataset whose final model is a single run"
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of nnU-Net's results; may hold other models")
    parser.add_argument(
        "--zip", action="store_true", help="also OUT/DATASET__PLANS__CONFIGURATION.zip, to be installed"
    )
    parser.add_argument("--member", metavar="NAME", help="one network in place of what predicts here")
    parser.add_argument("-f", "--folds", nargs="+", type=fold_name, metavar="FOLD", help="default: all finished ones")
    parser.add_argument("--labeled", metavar="N", type=budget_or_all, help="of several splits the one of this budget")
    parser.add_argument("--draw", type=non_negative, metavar="D", help="its draw of labels")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote")
    add_workspace(parser)
    return parser


def _request(arguments: argparse.Namespace) -> NnunetExportRequest:
    from autossl.data.runs import RunFilter
    from autossl.interop.nnunet_export import NnunetExportRequest

    return NnunetExportRequest(
        model=arguments.model,
        output=arguments.output,
        workspace=arguments.workspace,
        run=RunFilter(labeled=arguments.labeled, draw=arguments.draw),
        folds=tuple(arguments.folds) if arguments.folds else None,
        member=arguments.member,
        archive=arguments.zip,
        overwrite=arguments.overwrite,
    )


def _export(arguments: argparse.Namespace) -> None:
    from autossl.interop.nnunet_export import TESTED_VERSION, export_nnunet

    with CommandProgress(arguments.quiet) as progress:
        result = export_nnunet(_request(arguments), lambda _, done, total: progress.update("folds", done, total))
    print(f"{result.folder}: fold {', '.join(result.folds)}, for nnU-Net {TESTED_VERSION}")
    if result.archive is not None:
        print(f"{result.archive}: for nnUNetv2_install_pretrained_model_from_zip")
    for note in result.notes:
        print(f"note: {note}")
    results = shlex.quote(str(arguments.output.resolve()))
    print(f"nnUNet_results={results} nnUNetv2_predict -i IMAGES -o OUTPUT {shlex.join(result.predict_arguments)}")
    if result.has_rules:
        print("then the rules that belong to the model: autossl_apply_postprocessing with postprocessing.json of it")
