"""`autossl_convert`: turns a dataset of another layout into a raw dataset of the workspace."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autossl.cli.options import add_workers, add_workspace, label_pair, positive, positive_real
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.interop.convert.source import ConvertRequest

LAYOUTS = ("msd", "bids", "h5")
LISTS = ("train", "val", "test", "unlabeled")
EPILOG = """\
Raw folders of nnU-Net v2 need no converting. The source stays as it is; all cases are written, or nothing.

examples: autossl_convert msd Task05_Prostate
          autossl_convert bids ds000001 -d Dataset021_Lesions --channels T1w FLAIR --mask desc-lesion_mask
          autossl_convert h5 LA -d Dataset022_Atrium --axes xyz --spacing 1.25 0.625 0.625 --label atrium=1"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _convert, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_convert", EPILOG)
    parser.add_argument("layout", choices=LAYOUTS, help="Decathlon task, BIDS with masks in a derivative, or h5 arrays")
    parser.add_argument("source", type=Path, metavar="FOLDER", help="the dataset")
    parser.add_argument("-d", "--dataset", metavar="DatasetXXX_Name", help="what it becomes (msd: from TaskXX_Name)")
    parser.add_argument(
        "--channels",
        nargs="+",
        default=[],
        metavar="C",
        help="bids: which images, in channel order, as T1w or acq-post_T1w; msd, h5: other names for the channels",
    )
    parser.add_argument(
        "--label", action="append", default=[], type=one_label, metavar="NAME=VALUE", help="a class (repeatable)"
    )
    parser.add_argument("--test_as_unlabeled", action="store_true", help="test images join the unlabeled ones")
    parser.add_argument("--overwrite", action="store_true", help="replace the raw dataset of this name")
    bids = parser.add_argument_group("bids only")
    bids.add_argument("--masks", type=Path, metavar="FOLDER", help="the derivative (default: the one with masks)")
    bids.add_argument("--mask", metavar="M", help="which masks, as desc-lesion_mask or dseg (default: all)")
    bids.add_argument("--skip_incomplete", action="store_true", help="leave sessions without a channel out")
    h5 = parser.add_argument_group("h5 only")
    h5.add_argument("--axes", metavar="A", help="of the image arrays, as xyz or czyx (default: zyx)")
    h5.add_argument("--spacing", nargs=3, type=positive_real, metavar=("Z", "Y", "X"), help="in mm (default: 1 1 1)")
    for role in LISTS:
        h5.add_argument(f"--{role}", type=Path, metavar="LIST", help=f"list file (default: {role}.list or the like)")
    h5.add_argument(
        "--labeled",
        action="append",
        default=[],
        type=positive,
        metavar="N",
        help="let the list's first N training cases be those of --labeled N in training (repeatable)",
    )
    h5.add_argument("--patient", metavar="REGEX", help="what of a case id is the patient, as 'patient\\d+'")
    add_workers(parser, "read and write files")
    add_workspace(parser)
    return parser


def one_label(text: str) -> tuple[str, int]:
    """'name=1' as name and value."""
    name, values = label_pair(text)
    if len(values) > 1 or values[0] == 0:
        raise argparse.ArgumentTypeError(f"'{text}': expected one value above 0, as in organ=1")
    return name, values[0]


def _request(arguments: argparse.Namespace) -> ConvertRequest:
    from autossl.interop.convert.source import BidsOptions, ConvertRequest, H5Options

    lists = {role: path for role in LISTS if (path := getattr(arguments, role)) is not None}
    return ConvertRequest(
        layout=arguments.layout,
        source=arguments.source,
        dataset=arguments.dataset,
        workspace=arguments.workspace,
        channels=tuple(arguments.channels),
        labels=dict(arguments.label),
        test_as_unlabeled=arguments.test_as_unlabeled,
        overwrite=arguments.overwrite,
        n_workers=arguments.num_processes,
        bids=BidsOptions(arguments.masks, arguments.mask, arguments.skip_incomplete),
        h5=H5Options(
            axes=arguments.axes or "zyx",
            spacing_zyx_mm=tuple(arguments.spacing) if arguments.spacing else None,
            lists=lists,
            budgets=tuple(arguments.labeled),
            patient=arguments.patient,
        ),
    )


def _convert(arguments: argparse.Namespace) -> None:
    from autossl.interop.convert.convert import convert

    with CommandProgress(arguments.quiet) as progress:
        result = convert(_request(arguments), progress.update)
    raw = result.raw
    print(f"cases: {len(raw.labeled)} labeled, {len(raw.unlabeled)} unlabeled, {len(raw.test)} test")
    for path in result.splits:
        print(f"split: {path}")
    print(f"dataset: {result.folder}")
    print(f"next: autossl_plan_and_preprocess -d {result.folder.name}")
