"""The store of preprocessed cases: partial reads, completeness, labels apart from images, sharing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autossl.data.geometry import Geometry
from autossl.data.prepared import CaseProperties, PreparedCase
from autossl.data.problems import InvalidInput
from autossl.data.store import (
    CaseStore,
    open_array,
    read_class_locations,
    read_source,
    storage_grid,
    write_array,
)

SHAPE = (6, 20, 30)


def make_case(labeled: bool = True, masked: bool = False, seed: int = 0) -> PreparedCase:
    rng = np.random.default_rng(seed)
    geometry = Geometry(
        kind="sitk",
        size_xyz=(30, 20, 8),
        spacing_xyz=(1.0, 1.0, 2.5),
        origin_xyz=(0.5, -3.0, 1e-7),
        direction=(1, 0, 0, 0, 1, 0, 0, 0, 1),
        spacing_zyx_mm=(2.5, 1.0, 1.0),
        header={"pixdim": [1.0, 0.1]},
    )
    properties = CaseProperties(
        geometry=geometry,
        transpose_forward=(2, 0, 1),
        spacing_mm=(1.0, 2.5, 1.0),
        target_spacing_mm=(1.0, 2.5, 1.0),
        shape_before_crop=(30, 8, 20),
        crop_box=((1, 7), (0, 20), (0, 30)),
        shape=SHAPE,
        has_nonzero_mask=masked,
        values_hash="abc",
    )
    locations: dict[str, Any] = {
        "liver/left": np.array([[1, 2, 3], [4, 5, 6]], dtype=np.int16),
        "none": np.zeros((0, 3)),
    }
    return PreparedCase(
        image=rng.normal(size=(2, *SHAPE)).astype(np.float32),
        properties=properties,
        label=rng.integers(0, 3, SHAPE).astype(np.int8) if labeled else None,
        nonzero=rng.random(SHAPE) > 0.5 if masked else None,
        locations=locations if labeled else None,
    )


@pytest.fixture
def store(tmp_path: Path) -> CaseStore:
    return CaseStore(tmp_path / "data" / "0123")


def test_what_is_written_comes_back(store: CaseStore) -> None:
    case = make_case(masked=True)
    store.write("a.b", case)
    assert store.cases() == ["a.b"]
    np.testing.assert_array_equal(store.image("a.b")[:], case.image)
    np.testing.assert_array_equal(store.label("a.b")[1:3, :, 4:9], case.label[1:3, :, 4:9])  # type: ignore[index]
    np.testing.assert_array_equal(store.nonzero("a.b")[:], case.nonzero)
    assert store.label("a.b").dtype == np.int8
    assert store.nonzero("a.b").dtype == np.bool_
    assert store.properties("a.b") == case.properties
    locations = store.class_locations("a.b")
    assert list(locations) == ["liver/left", "none"]
    assert locations["liver/left"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert locations["none"].shape == (0, 3)


def test_properties_tell_the_way_back() -> None:
    properties = make_case().properties
    assert properties.shape_after_crop == (6, 20, 30)
    image_axes = tuple(range(3))
    transposed = tuple(image_axes[axis] for axis in properties.transpose_forward)
    assert tuple(transposed[axis] for axis in properties.transpose_backward) == image_axes


def test_properties_refuse_what_they_do_not_know() -> None:
    content = make_case().properties.to_json() | {"magic": 1}
    with pytest.raises(InvalidInput, match="magic.*preprocess the case again"):
        CaseProperties.from_json(content)


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_has_asks_for_every_file_that_the_case_needs(store: CaseStore, labeled: bool, masked: bool) -> None:
    needed = [store.image_path, store.properties_path]
    needed += [store.nonzero_path] if masked else []
    needed += [store.label_path, store.locations_path] if labeled else []
    for path_of in needed:
        store.write("a", make_case(labeled, masked))
        assert store.has("a", labeled)
        path_of("a").unlink()
        assert not store.has("a", labeled)


def test_an_unlabeled_case_is_not_there_as_a_labeled_one(store: CaseStore) -> None:
    store.write("a", make_case(labeled=False))
    assert store.has("a", labeled=False)
    assert not store.has("a", labeled=True)


@pytest.mark.parametrize("share_kept", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("part", ["image_path", "label_path", "locations_path", "properties_path"])
def test_a_cut_off_file_does_not_count(store: CaseStore, part: str, share_kept: float) -> None:
    store.write("a", make_case())
    path: Path = getattr(store, part)("a")
    content = path.read_bytes()
    path.write_bytes(content[: int(share_kept * len(content))])
    assert not store.has("a", labeled=True)


def test_a_label_of_another_shape_does_not_count(store: CaseStore) -> None:
    store.write("a", make_case())
    write_array(store.label_path("a"), np.zeros((3, 3, 3), dtype=np.int8))
    assert not store.has("a", labeled=True)


def test_writing_an_image_anew_drops_the_label_of_before(store: CaseStore) -> None:
    store.write("a", make_case())
    store.write("a", make_case(labeled=False, seed=1))
    assert not store.label_path("a").exists()


def test_adding_a_label_leaves_the_image_file_alone(store: CaseStore) -> None:
    store.write("a", make_case(labeled=False))
    before = store.image_path("a").stat()
    case = make_case()
    store.write_label("a", case.label, case.locations or {}, source={"file": 1})  # type: ignore[arg-type]
    assert store.has("a", labeled=True)
    assert store.image_path("a").stat().st_ino == before.st_ino
    assert store.image_path("a").stat().st_mtime_ns == before.st_mtime_ns
    assert read_source(store.label_path("a")) == {"file": 1}
    assert read_source(store.image_path("a")) is None


def test_sharing_takes_the_files_and_no_space(store: CaseStore, tmp_path: Path) -> None:
    store.write("a", make_case(masked=True))
    other = CaseStore(tmp_path / "other")
    other.share("a", store, labeled=True)
    assert other.has("a", labeled=True)
    assert other.image_path("a").stat().st_ino == store.image_path("a").stat().st_ino
    other.write("a", make_case(seed=5))
    np.testing.assert_array_equal(store.image("a")[:], make_case(masked=True).image)


def test_sharing_copies_where_links_are_refused(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    store.write("a", make_case(labeled=False))
    other = CaseStore(tmp_path / "other")
    other.share("a", store, labeled=False)
    assert other.has("a", labeled=False)


def test_missing_and_foreign_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"does not exist.*autossl_plan_and_preprocess"):
        open_array(tmp_path / "a.b2nd")
    (tmp_path / "b.b2nd").write_bytes(b"not an array")
    with pytest.raises(InvalidInput, match=r"b\.b2nd: not a complete array"):
        open_array(tmp_path / "b.b2nd")
    with pytest.raises(InvalidInput, match="does not exist"):
        read_class_locations(tmp_path / "c.npz")


def test_a_plane_and_a_patch_decompress_a_small_part_of_a_volume(tmp_path: Path) -> None:
    shape = (1, 64, 256, 256)
    chunks, blocks = storage_grid(shape, 4)
    assert np.prod(blocks) * 4 <= 64 * 1024
    touched_by_a_plane = blocks[1] * 256 * 256
    assert touched_by_a_plane <= 4 * 256 * 256
    write_array(tmp_path / "a.b2nd", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    array = open_array(tmp_path / "a.b2nd")
    assert (tuple(array.chunks), tuple(array.blocks)) == (chunks, blocks)


@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (3, 1, 900, 1100), (2, 200, 3, 3), (40, 50, 60)])
def test_any_shape_can_be_stored(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    write_array(tmp_path / "a.b2nd", array)
    np.testing.assert_array_equal(open_array(tmp_path / "a.b2nd")[:], array)


@pytest.mark.parametrize("part", ["image_path", "nonzero_path", "label_path", "locations_path"])
def test_a_flipped_bit_in_a_case_is_named_with_its_file(tmp_path: Path, part: str) -> None:
    store = CaseStore(tmp_path)
    store.write("case", make_case(masked=True))
    assert store.damaged("case", labeled=True) == {}
    path = getattr(store, part)("case")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert list(store.damaged("case", labeled=True)) == [path]
    assert list(store.damaged("case", labeled=False)) == ([path] if part in ("image_path", "nonzero_path") else [])


def test_changed_properties_are_no_properties(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.write("case", make_case())
    path = store.properties_path("case")
    path.write_text(path.read_text().replace("2.5", "3.5", 1))
    assert not store.has("case", labeled=False)
    with pytest.raises(InvalidInput, match="checksum does not fit.*autossl_plan_and_preprocess again"):
        store.properties("case")
