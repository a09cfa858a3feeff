"""Channels and groups by name."""

from __future__ import annotations

import pytest

from autossl.data.channels import ImageChannels
from autossl.data.description import DatasetDescription
from autossl.data.problems import InvalidInput

CHANNELS = ImageChannels(("T1", "t1", "FLAIR", "T1+C", "0"), {"flair": (0, 2), "late": (3, 2)})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("T1", (0,)),
        ("t1", (1,)),
        ("FLAIR", (2,)),
        ("flair", (0, 2)),
        ("LATE", (3, 2)),
        ("T1+C", (3,)),
        ("t1+c", (3,)),
        ("T1+FLAIR", (0, 2)),
        (" 3 ", (3,)),
        ("0", (4,)),  # a name goes before a number
        ("late+1", (3, 2, 1)),
    ],
)
def test_names_and_numbers(text: str, expected: tuple[int, ...]) -> None:
    assert CHANNELS.find(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("T2", "'T2' is unknown. Expected: one of"),
        ("5", "'5' is unknown.*0 to 4"),
        ("-1", "unknown"),
        ("", "unknown"),
        ("Flair", "several"),
        ("T1+0+T1", "twice"),
        ("T1+T2", "'T2' is unknown"),
    ],
)
def test_what_names_nothing(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        CHANNELS.find(text)


def test_the_default_pair() -> None:
    assert CHANNELS.default_pair() == ((0, 2), (3, 2))
    assert ImageChannels(("a", "b", "c"), {"one": (2,)}).default_pair() == ((0,), (1,))
    assert ImageChannels.numbered(1).default_pair() == ((0,),)


def test_names_of_channels() -> None:
    assert CHANNELS.name_of((2, 3)) == "late"
    assert CHANNELS.name_of((2,)) == "FLAIR"
    assert CHANNELS.listed([(1,), (1, 4)]) == "t1, t1+0"
    assert ImageChannels(("MR", "MR", "CT")).listed([(0, 1), (2,)]) == "0+1, CT"


def description(groups: dict[str, list[int]]) -> DatasetDescription:
    return DatasetDescription.model_validate(
        {
            "channel_names": {"0": "T1", "1": "FLAIR"},
            "labels": {"background": 0, "lesion": 1},
            "file_ending": ".nii.gz",
            "channel_groups": groups,
        }
    )


def test_dataset_json_names_them() -> None:
    assert description({"anatomy": [0], "both": [0, 1]}).channels.find("both") == (0, 1)


@pytest.mark.parametrize("channels", [[], [1, 1]])
def test_groups_that_are_none(channels: list[int]) -> None:
    with pytest.raises(ValueError, match="'odd' needs channels, each once"):
        description({"odd": channels})
