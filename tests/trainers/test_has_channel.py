"""Which channels a case has: known from its stored image, whatever augmentation makes of a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_store import TinyStore

from autossl.data.store import write_array
from autossl.preprocessing.normalize import normalize_channel
from autossl.trainers.base import BatchRequest, StreamRequest
from autossl.trainers.batches import BatchMaker, Streams
from autossl.trainers.patch_reader import CaseReader
from toys import toy_architecture, toy_configuration, toy_schema

SHAPE = (5, 12, 14)


def image(**channels: Any) -> np.ndarray:
    """Three noisy channels, some of them replaced."""
    made = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    for name, value in channels.items():
        made[int(name.removeprefix("c"))] = value
    return made


def only_in_a_corner() -> np.ndarray:
    values = np.zeros(SHAPE, dtype=np.float32)
    values[0, 0, 0] = 1
    return values


@pytest.mark.parametrize(
    "content, expected",
    [
        (image(), (True, True, True)),
        (image(c1=0), (True, False, True)),
        (image(c0=-1024.0, c2=0), (False, True, False)),
        (image(c1=only_in_a_corner()), (True, True, True)),
        (image(c1=3 + 1e-6 * np.random.default_rng(1).random(SHAPE)), (True, False, True)),  # what resampling leaves
        (image(c1=1e-3 * np.random.default_rng(1).random(SHAPE)), (True, True, True)),  # small values, no less there
        (image(c0=0)[:1], (False,)),
    ],
)
def test_a_channel_of_one_value_is_missing(content: np.ndarray, expected: tuple[bool, ...], tmp_path: Path) -> None:
    write_array(tmp_path / "a.b2nd", content)
    assert CaseReader().has_channel(tmp_path / "a.b2nd") == expected


@pytest.mark.parametrize("scheme", ["ZScoreNormalization", "RescaleTo01Normalization", "NoNormalization"])
def test_normalization_leaves_a_missing_channel_missing(scheme: str, tmp_path: Path) -> None:
    empty = normalize_channel(np.full(SHAPE, 0.1, dtype=np.float32), scheme)
    write_array(tmp_path / "a.b2nd", np.stack([empty, image()[0]]))
    assert CaseReader().has_channel(tmp_path / "a.b2nd") == (False, True)


def test_a_case_is_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_array(tmp_path / "a.b2nd", image(c1=0))
    calls = []
    monkeypatch.setattr(
        "autossl.trainers.patch_reader._channels_with_content", lambda array: calls.append(1) or (True,)
    )
    reader = CaseReader()
    assert reader.has_channel(tmp_path / "a.b2nd") == reader.has_channel(tmp_path / "a.b2nd") == (True,)
    assert len(calls) == 1


@pytest.mark.parametrize("augment", [False, True])
def test_batches_tell_it_of_each_patch(augment: bool, tmp_path: Path) -> None:
    store = TinyStore(tmp_path)
    label = np.random.default_rng(0).integers(0, 3, SHAPE)
    labeled = [store.labeled("whole", image(), label), store.labeled("lacks 1", image(c1=0), label)]
    unlabeled = [store.unlabeled("only 2", image(c0=0, c1=7))]
    plan = toy_configuration(2, 3, patch_size=(8, 8), architecture=toy_architecture(2, (4,)))
    maker = BatchMaker(Streams(tuple(labeled), tuple(unlabeled)), plan, toy_schema(), seed=0, augment=augment)
    batch = maker.make(0, BatchRequest(StreamRequest(8, sampler="foreground"), StreamRequest(2)))
    assert set(batch.labeled.case_ids) == {"whole", "lacks 1"}
    assert batch.labeled.has_channel is not None
    for case, found in zip(batch.labeled.case_ids, batch.labeled.has_channel.tolist(), strict=True):
        assert found == [True, case == "whole", True]
    assert batch.unlabeled is not None
    assert batch.unlabeled.has_channel is not None
    assert batch.unlabeled.has_channel.tolist() == [[False, False, True]] * 2
    nothing = maker.make(0, BatchRequest(StreamRequest(8, sampler="foreground"), StreamRequest(0)))
    assert nothing.unlabeled is None
