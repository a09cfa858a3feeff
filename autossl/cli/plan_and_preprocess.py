"""`autossl_plan_and_preprocess`: measures a dataset, plans it, and preprocesses its cases."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from autossl.cli.options import add_workers, add_workspace, positive_real
from autossl.cli.run_command import new_parser

EPILOG = """\
Writes fingerprint.json, plans_PRESET.json (every decision with its why) and data/ below preprocessed/DATASET.
Run it again after adding cases: what is finished is not done again.

example: autossl_plan_and_preprocess -d 4 --preset nano"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = new_parser("autossl_plan_and_preprocess", EPILOG)
    parser.add_argument("-d", "--dataset", required=True, metavar="DATASET", help="4, 004, Name or Dataset004_Name")
    parser.add_argument(
        "-c",
        "--configurations",
        nargs="+",
        metavar="C",
        help="preprocess for these only: 2d 3d_fullres 3d_lowres (default: all that are planned)",
    )
    parser.add_argument(
        "--preset", default="plain", metavar="P", help="plain, resenc_m, resenc_l, resenc_xl or nano (default: plain)"
    )
    parser.add_argument("--no_preprocessing", action="store_true", help="write the plans and stop")
    parser.add_argument(
        "--gpu_memory_gb", type=positive_real, metavar="G", help="plan for so much memory (default: the preset's own)"
    )
    parser.add_argument(
        "--overwrite_target_spacing",
        type=positive_real,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="spacing in mm to resample to, in the axis order of the images",
    )
    parser.add_argument(
        "--verify_dataset_integrity",
        action="store_true",
        help="check every voxel of images and labels as well (the cheap checks always run)",
    )
    parser.add_argument(
        "--remap_labels",
        nargs="+",
        metavar="OLD=NEW",
        help="read these label values as others; the raw files stay as they are",
    )
    add_workers(parser, "read and preprocess cases")
    add_workspace(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return 0
