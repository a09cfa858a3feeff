"""`autossl_import_nnunet`: makes a run of a trained nnU-Net v2 model."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autossl.cli.options import add_workers, add_workspace, fold_name
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.interop.nnunet_import import ImportRequest

EPILOG = """\
The model is checked before anything is written; nothing in it is executed. The dataset's files are not needed.

examples: autossl_import_nnunet nnUNet_results/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__2d -d 4
          autossl_import_nnunet hippocampus.zip -d Dataset004_Hippocampus --select 3d_fullres
          autossl_import_nnunet MODEL_FOLDER -d 4 --splits splits_final.json --plan_training"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _import, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_import_nnunet", EPILOG)
    parser.add_argument(
        "model", type=Path, metavar="MODEL_FOLDER|ZIP", help="folder TRAINER__PLANS__CONFIGURATION, or an exported zip"
    )
    parser.add_argument("-d", "--dataset", required=True, metavar="D", help="dataset that the run will belong to")
    parser.add_argument("-f", "--folds", nargs="+", type=fold_name, metavar="FOLD", help="default: all there are")
    parser.add_argument("--select", metavar="TEXT", help="of several models the one with this in its folder's name")
    parser.add_argument(
        "--checkpoint", default="checkpoint_final.pth", metavar="FILE", help="in each fold (default: %(default)s)"
    )
    parser.add_argument(
        "--splits", type=Path, metavar="FILE", help="its splits_final.json: which cases each fold was trained on"
    )
    parser.add_argument(
        "--plan_training",
        action="store_true",
        help="make its plan a preset of the planned dataset and preprocess the cases, to train its very network",
    )
    parser.add_argument("--tag", metavar="T", help="of the run (default: the trainer, where it is not nnUNetTrainer)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier import made")
    add_workers(parser, "preprocess (--plan_training)")
    add_workspace(parser)
    return parser


def _request(arguments: argparse.Namespace) -> ImportRequest:
    from autossl.interop.nnunet_import import ImportRequest

    return ImportRequest(
        source=arguments.model,
        dataset=arguments.dataset,
        workspace=arguments.workspace,
        folds=None if arguments.folds is None else tuple(arguments.folds),
        select=arguments.select,
        checkpoint=arguments.checkpoint,
        splits=arguments.splits,
        tag=arguments.tag,
        overwrite=arguments.overwrite,
    )


def _import(arguments: argparse.Namespace) -> None:
    from autossl.interop.nnunet_import import import_nnunet

    with CommandProgress(arguments.quiet) as progress:
        result = import_nnunet(_request(arguments), lambda _, done, total: progress.update("folds", done, total))
        plans_file = None
        if arguments.plan_training:
            from autossl.interop.nnunet_preset import plan_training

            plans_file = plan_training(
                result.model,
                arguments.workspace,
                arguments.num_processes,
                lambda stage, _, done, total: progress.update(stage, done, total),
                arguments.overwrite,
            )
    model, folder = result.model, shlex.quote(str(result.model.folder))
    print(f"model: {result.trainer}, {model.run.configuration} of {result.origin}, fold {', '.join(model.folds)}")
    print(f"mirroring: axes {', '.join(map(str, model.plan.mirror_axes)) or 'none'}")
    if not model.run.folds:
        print(
            "seen in training: not known; --splits tells, and a training that starts from it is then checked for leaks"
        )
    print(f"{'was imported already' if result.already else 'imported'}: {model.folder}")
    print(f"predict: autossl_predict -i IMAGES -o SEGMENTATIONS --model {folder}")
    if plans_file is not None:
        words = f"{model.run.dataset} {model.run.configuration} {model.folds[0]} --preset {model.plans.preset}"
        print(f"plans: {plans_file}")
        print(f"train: autossl_train {words} --init {folder}")
