"""`autossl_export_model`: puts a final model into one zip file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autossl.cli.options import add_workspace, budget_or_all, fold_name, non_negative
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.interop.model_archive import ExportRequest

EPILOG = """\
In the file: what predicts (weights, plans, inference plan with its postprocessing) and model_card.md. Names of cases
and patients, paths, optimizers and networks that do not predict stay here.

examples: autossl_export_model Hippocampus hippocampus.zip
          autossl_export_model results/Dataset004_Hippocampus/default/2d__nano__supervised__seed-0 model.zip"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _export, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_export_model", EPILOG)
    parser.add_argument(
        "model", metavar="DATASET|FOLDER", help="dataset (its final model), or the folder of a final model or run"
    )
    parser.add_argument("output", type=Path, metavar="OUT.zip", help="the file to write")
    parser.add_argument("--labeled", metavar="N", type=budget_or_all, help="of several splits the one of this budget")
    parser.add_argument("--draw", type=non_negative, metavar="D", help="its draw of labels")
    parser.add_argument("-f", "--folds", nargs="+", type=fold_name, metavar="FOLD", help="of a single run")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.zip where it is there")
    add_workspace(parser)
    return parser


def _request(arguments: argparse.Namespace) -> ExportRequest:
    from autossl.data.runs import RunFilter
    from autossl.interop.model_archive import ExportRequest

    return ExportRequest(
        model=arguments.model,
        output=arguments.output,
        workspace=arguments.workspace,
        run=RunFilter(labeled=arguments.labeled, draw=arguments.draw),
        folds=tuple(arguments.folds) if arguments.folds else None,
        overwrite=arguments.overwrite,
    )


def _export(arguments: argparse.Namespace) -> None:
    from autossl.interop.model_archive import export_model

    with CommandProgress(arguments.quiet) as progress:
        result = export_model(_request(arguments), lambda _, done, total: progress.update("folds", done, total))
    for name, folds in result.members:
        print(f"run: {name}, fold {', '.join(folds)}")
    left = f"; {result.n_bytes_left / 1e6:.1f} MB that only training needs were left out"
    print(f"{result.output}: {result.n_bytes / 1e6:.1f} MB{left}")
    print("read model_card.md in it before you share it")
