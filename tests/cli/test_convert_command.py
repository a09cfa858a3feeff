"""`autossl_convert` hands its options on, and says what there is now."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from autossl.cli import convert
from autossl.interop.convert.source import BidsOptions, ConvertRequest, H5Options


def request(*argv: str) -> ConvertRequest:
    return convert._request(convert._parser().parse_args(argv))


def test_options_become_a_request() -> None:
    assert request("msd", "Task05_Prostate") == ConvertRequest("msd", Path("Task05_Prostate"))
    text = (
        "bids in -d Dataset021_L --channels T1w acq-post_T1w --label lesion=1 --masks m --mask dseg --skip_incomplete"
    )
    assert request(*text.split()) == ConvertRequest(
        "bids",
        Path("in"),
        "Dataset021_L",
        channels=("T1w", "acq-post_T1w"),
        labels={"lesion": 1},
        bids=BidsOptions(Path("m"), "dseg", True),
    )
    text = "h5 in --axes xyz --spacing 3 2 1.5 --train a --val b --labeled 4 --labeled 8 --patient p --overwrite -np 0"
    assert request(*text.split()) == ConvertRequest(
        "h5",
        Path("in"),
        overwrite=True,
        n_workers=0,
        h5=H5Options("xyz", (3.0, 2.0, 1.5), {"train": Path("a"), "val": Path("b")}, (4, 8), "p"),
    )


@pytest.mark.parametrize("text", ["organ=0", "organ=1,2", "organ"])
def test_a_label_is_one_value_above_0(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        convert.one_label(text)


def test_what_is_wrong_is_said_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["msd", str(tmp_path), "--workspace", str(tmp_path / "w")]) == 2
    assert "no dataset name" in capsys.readouterr().err
