"""Filling a store: only what is missing, whatever killed the run before, and errors that name case and file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from autossl.data.parallel import WorkerError
from autossl.data.problems import InvalidInput
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.store import CaseStore
from autossl.preprocessing import preprocess
from autossl.preprocessing.preprocess import preprocess_cases

SPACING_ZYX = (2.0, 1.0, 1.0)


def write_volume(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*SPACING_ZYX[::-1], 1])
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), path)  # type: ignore[no-untyped-call]


def add_case(folder: Path, case: str, labeled: bool = True, images: str = "imagesTr", seed: int = 0) -> None:
    rng = np.random.default_rng([seed, *case.encode()])
    write_volume(folder / images / f"{case}_0000.nii.gz", rng.uniform(1, 9, (4, 6, 8)).astype(np.float32))
    if labeled:
        add_label(folder, case)


def add_label(folder: Path, case: str, value: int = 1) -> None:
    label = np.zeros((4, 6, 8), dtype=np.uint8)
    label[1:3, 2:4, 3:6] = value
    write_volume(folder / "labelsTr" / f"{case}.nii.gz", label)


@pytest.fixture
def raw_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "raw" / "Dataset900_Tiny"
    folder.mkdir(parents=True)
    labels = {"background": 0, "organ": 1, "lesion": 2}
    description = {"channel_names": {"0": "MR"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 2}
    (folder / "dataset.json").write_text(json.dumps(description))
    for case in ("a", "b"):
        add_case(folder, case)
    add_case(folder, "u", labeled=False, images="imagesUn")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "preprocessed" / "data"


def run(raw_folder: Path, plans: Any, data: Path, configuration: str = "3d_fullres", **options: Any) -> dict[str, str]:
    store = CaseStore(data / plans.data_hash(configuration))
    return dict(preprocess_cases(read_raw_dataset(raw_folder), plans, configuration, store, 0, **options))


def state_of_files(store: CaseStore) -> dict[str, tuple[int, int]]:
    files = [path for path in store.folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(store.folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def plans(make_plans: Any) -> Any:
    return make_plans(spacing=(2.0, 0.8, 1.0))


@pytest.fixture
def store(plans: Any, data: Path) -> CaseStore:
    return CaseStore(data / plans.data_hash("3d_fullres"))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_all_cases_are_made_and_then_kept(raw_folder: Path, plans: Any, store: CaseStore, n_workers: int) -> None:
    raw, seen = read_raw_dataset(raw_folder), []
    outcomes = preprocess_cases(raw, plans, "3d_fullres", store, n_workers, progress=lambda *step: seen.append(step))
    assert outcomes == {"a": "made", "b": "made", "u": "made"}
    assert seen == [(1, 3, "a"), (2, 3, "b"), (3, 3, "u")]
    assert store.has("a", labeled=True)
    assert store.has("u", labeled=False)
    assert not store.label_path("u").exists()
    assert store.image("a").shape == (1, 4, 8, 8)
    assert set(store.class_locations("a")) == {"organ", "lesion"}
    before = state_of_files(store)
    assert set(preprocess_cases(raw, plans, "3d_fullres", store, n_workers).values()) == {"kept"}
    assert state_of_files(store) == before


def test_the_folder_says_what_its_hash_stands_for(raw_folder: Path, plans: Any, data: Path, store: CaseStore) -> None:
    run(raw_folder, plans, data)
    parameters = json.loads((store.folder / "parameters.json").read_text())
    assert parameters["spacing"] == [2.0, 0.8, 1.0]


def test_a_new_case_is_added_and_the_others_are_not_touched(
    raw_folder: Path, plans: Any, data: Path, store: CaseStore
) -> None:
    run(raw_folder, plans, data)
    before = state_of_files(store)
    add_case(raw_folder, "c")
    assert run(raw_folder, plans, data) == {"a": "kept", "b": "kept", "c": "made", "u": "kept"}
    assert before.items() <= state_of_files(store).items()


def test_a_label_that_comes_later_gets_only_its_own_files(
    raw_folder: Path, plans: Any, data: Path, store: CaseStore
) -> None:
    add_case(raw_folder, "c", labeled=False)
    run(raw_folder, plans, data)
    before = state_of_files(store)
    add_label(raw_folder, "c", value=2)
    assert run(raw_folder, plans, data)["c"] == "label made"
    after = state_of_files(store)
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"labels/c.b2nd", "locations/c.npz"}
    later = store.label("c")[:]
    store.properties_path("c").unlink()
    assert run(raw_folder, plans, data)["c"] == "made"
    np.testing.assert_array_equal(store.label("c")[:], later)


def test_a_corrected_label_or_image_is_noticed(raw_folder: Path, plans: Any, data: Path, store: CaseStore) -> None:
    run(raw_folder, plans, data)
    image = store.image("b")[:]
    add_label(raw_folder, "a", value=2)
    add_case(raw_folder, "b", seed=1)
    assert run(raw_folder, plans, data) == {"a": "label made", "b": "made", "u": "kept"}
    assert store.label("a")[:].max() == 2
    assert len(store.class_locations("a")["organ"]) == 0
    assert not np.array_equal(store.image("b")[:], image)


def test_remapped_labels_are_read_anew(raw_folder: Path, plans: Any, data: Path, store: CaseStore) -> None:
    run(raw_folder, plans, data)
    assert run(raw_folder, plans, data, remap_labels={1: 2, 2: 1}) == {
        "a": "label made",
        "b": "label made",
        "u": "kept",
    }
    assert set(np.unique(store.label("a")[:])) == {0, 2}
    assert set(run(raw_folder, plans, data, remap_labels={1: 2, 2: 1}).values()) == {"kept"}


@pytest.mark.parametrize("part", ["image_path", "label_path", "locations_path", "properties_path"])
def test_a_damaged_file_is_made_again(raw_folder: Path, plans: Any, data: Path, store: CaseStore, part: str) -> None:
    run(raw_folder, plans, data)
    path = getattr(store, part)("a")
    path.write_bytes(path.read_bytes()[:-30])
    assert run(raw_folder, plans, data)["a"] in ("made", "label made")
    assert store.has("a", labeled=True)
    assert set(run(raw_folder, plans, data).values()) == {"kept"}


@pytest.mark.parametrize("part", ["image_path", "label_path", "locations_path"])
def test_a_flipped_bit_is_noticed_named_and_mended(
    raw_folder: Path, plans: Any, data: Path, store: CaseStore, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(raw_folder, plans, data)
    path = getattr(store, part)("a")
    whole = path.read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    assert run(raw_folder, plans, data)["a"] in ("made", "label made")
    if part != "label_path":  # a label of so few voxels has so little content that the bit spoils its frame
        assert f"{path}: " in caplog.text
    assert store.damaged("a", labeled=True) == {}
    if part == "image_path":
        np.testing.assert_array_equal(store.image("a")[:], read_again(raw_folder, plans, data, "a"))


def read_again(raw_folder: Path, plans: Any, data: Path, case: str) -> Any:
    """The image of a case in a store that never was damaged."""
    run(raw_folder, plans, data.with_name("fresh"))
    return CaseStore(data.with_name("fresh") / plans.data_hash("3d_fullres")).image(case)[:]


def test_configurations_that_agree_on_a_case_share_its_files(raw_folder: Path, plans: Any, data: Path) -> None:
    run(raw_folder, plans, data, "3d_fullres")
    assert set(run(raw_folder, plans, data, "2d").values()) == {"linked"}
    first, second = (CaseStore(data / plans.data_hash(name)) for name in ("3d_fullres", "2d"))
    assert first.folder != second.folder
    assert first.image_path("a").stat().st_ino == second.image_path("a").stat().st_ino
    assert second.has("a", labeled=True)
    assert set(run(raw_folder, plans, data, "2d").values()) == {"kept"}


def test_configurations_that_disagree_do_not_share(raw_folder: Path, make_plans: Any, data: Path) -> None:
    plans = make_plans(spacing=(1.0, 1.0, 1.0))
    run(raw_folder, plans, data, "3d_fullres")
    assert set(run(raw_folder, plans, data, "2d").values()) == {"made"}


def test_the_label_of_a_shared_case_is_made_where_only_the_image_can_be_shared(
    raw_folder: Path, plans: Any, data: Path
) -> None:
    run(raw_folder, plans, data, "3d_fullres")
    add_label(raw_folder, "a", value=2)
    assert run(raw_folder, plans, data, "2d")["a"] == "linked"
    first, second = (CaseStore(data / plans.data_hash(name)) for name in ("3d_fullres", "2d"))
    assert (first.label("a")[:].max(), second.label("a")[:].max()) == (1, 2)


def test_a_fault_names_its_case_and_file_and_keeps_what_is_finished(
    raw_folder: Path, plans: Any, data: Path, store: CaseStore
) -> None:
    write_volume(raw_folder / "labelsTr" / "b.nii.gz", np.zeros((4, 6, 7), dtype=np.uint8))
    with pytest.raises(InvalidInput) as caught:
        run(raw_folder, plans, data)
    (problem,) = caught.value.problems
    assert problem.case == "b"
    assert problem.file == raw_folder / "labelsTr" / "b.nii.gz"
    assert "(4, 6, 7)" in problem.found
    assert store.has("a", labeled=True)
    assert not store.image_path("b").exists()


def test_a_killed_worker_names_its_case(
    raw_folder: Path, plans: Any, store: CaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = preprocess.prepare_case

    def die_on_label_2(image: Any, label: Any, *rest: Any) -> Any:
        if label is not None and label.max() == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return genuine(image, label, *rest)

    add_label(raw_folder, "b", value=2)
    monkeypatch.setattr(preprocess, "prepare_case", die_on_label_2)
    with pytest.raises(WorkerError, match=r"^b: .*SIGKILL"):
        preprocess_cases(read_raw_dataset(raw_folder), plans, "3d_fullres", store, 2)


def test_a_run_that_is_killed_in_the_middle_of_a_file_continues(
    raw_folder: Path, plans: Any, store: CaseStore, tmp_path: Path
) -> None:
    plans_file = tmp_path / "plans.json"
    plans_file.write_text(json.dumps(plans.to_json()))
    script = f"""
import os, pathlib, signal
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data import store
from autossl.planners.plans import read_plans
from autossl.preprocessing.preprocess import preprocess_cases
genuine = store.np.savez
def die_while_writing(file, **arrays):
    if "-b.npz" in str(file):
        pathlib.Path(file).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    genuine(file, **arrays)
store.np.savez = die_while_writing
raw = read_raw_dataset(pathlib.Path({str(raw_folder)!r}))
plans = read_plans(pathlib.Path({str(plans_file)!r}))
preprocess_cases(raw, plans, "3d_fullres", store.CaseStore(pathlib.Path({str(store.folder)!r})), 0)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert store.has("a", labeled=True)
    assert not store.has("b", labeled=True)
    half = list((store.folder / "locations").glob(".partial-*"))
    assert len(half) == 1
    finished = store.image_path("a").stat().st_mtime_ns
    outcomes = preprocess_cases(read_raw_dataset(raw_folder), plans, "3d_fullres", store, 0)
    assert outcomes == {"a": "kept", "b": "label made", "u": "made"}
    assert store.image_path("a").stat().st_mtime_ns == finished
    assert store.has("b", labeled=True)
    assert store.cases() == ["a", "b", "u"]
    assert not half[0].exists()


def test_memory_is_estimated_from_the_header(raw_folder: Path, plans: Any, store: CaseStore, monkeypatch: Any) -> None:
    seen: list[int] = []
    genuine = preprocess.parallel_map

    def watch(function: Any, items: Any, *rest: Any, bytes_of: Any, **options: Any) -> Any:
        seen.extend(bytes_of(item) for item in items)
        return genuine(function, items, *rest, **options)

    monkeypatch.setattr(preprocess, "parallel_map", watch)
    preprocess_cases(read_raw_dataset(raw_folder), plans, "3d_fullres", store, 0)
    before, after = 4 * 6 * 8, 4 * 8 * 8
    assert seen == [4 * (before + after) + 24 * after] * 3
