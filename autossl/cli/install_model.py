"""`autossl_install_model`: puts a shared model into the workspace."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autossl.cli.options import add_workspace
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.interop.model_install import InstallRequest

EPILOG = """\
The file is checked before anything is written; nothing in it is executed. The dataset itself is not needed.

example: autossl_install_model hippocampus.zip
         autossl_predict -i IMAGES -o SEGMENTATIONS -d Hippocampus"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _install, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_install_model", EPILOG)
    parser.add_argument("archive", type=Path, metavar="ZIP", help="file of autossl_export_model")
    parser.add_argument("--name", metavar="N", help="folder results/DATASET/installed-N (default: N is its split)")
    parser.add_argument("--overwrite", action="store_true", help="replace the installed model of this name")
    add_workspace(parser)
    return parser


def _request(arguments: argparse.Namespace) -> InstallRequest:
    from autossl.interop.model_install import InstallRequest

    return InstallRequest(
        archive=arguments.archive,
        workspace=arguments.workspace,
        name=arguments.name,
        overwrite=arguments.overwrite,
    )


def _install(arguments: argparse.Namespace) -> None:
    from autossl.interop.model_install import install_model

    with CommandProgress(arguments.quiet) as progress:
        result = install_model(_request(arguments), lambda _, done, total: progress.update("files", done, total))
    for folder, folds in result.members:
        print(f"run: {folder.name}, fold {', '.join(folds)}")
    print(f"{'was installed already' if result.already else 'installed'}: {result.folder}")
    print(f"about it: {result.card}")
    print(f"predict: autossl_predict -i IMAGES -o SEGMENTATIONS --model {result.folder}")
