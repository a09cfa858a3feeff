"""The function behind `autossl_plan_and_preprocess`, on a few tiny phantom volumes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from autossl.data.files import read_json, write_json
from autossl.data.locks import Holder, hold, lock_beside
from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.problems import InvalidInput
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.store import CaseStore
from autossl.data.workspace import Workspace
from autossl.planners.plan_and_preprocess import (
    PlanRequest,
    PlanResult,
    find_plans,
    plan_and_preprocess,
    plans_file,
    preprocess_planned,
)
from autossl.planners.plan_experiment import PlanOptions

SETTINGS = PhantomSettings(n_labeled=3, n_unlabeled=2, n_test=1, shape_zyx=(14, 20, 18))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantom_dataset(tmp_path_factory.mktemp("phantom"), SETTINGS)


@pytest.fixture
def workspace(pristine: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(pristine, tmp_path / "workspace" / "raw" / pristine.name)
    return Workspace(tmp_path / "workspace")


@pytest.fixture(scope="module")
def planned_once(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planned")
    shutil.copytree(pristine, root / "raw" / pristine.name)
    _plan(Workspace(root))
    return root


@pytest.fixture
def planned(planned_once: Path, tmp_path: Path) -> Workspace:
    """A workspace that was planned for nano; scans of unchanged cases are reused."""
    return Workspace(shutil.copytree(planned_once, tmp_path / "planned"))


def _plan(workspace: Workspace, **options: object) -> PlanResult:
    (dataset,) = (folder.name for folder in workspace.raw.iterdir())
    arguments: dict[str, Any] = {"preset": "nano", "preprocess": False, "n_workers": 0} | options
    on_progress = arguments.pop("on_progress", None)
    of_the_plan = {field.name for field in fields(PlanOptions)}
    chosen = PlanOptions(**{key: value for key, value in arguments.items() if key in of_the_plan})
    rest = {key: value for key, value in arguments.items() if key not in of_the_plan}
    return plan_and_preprocess(PlanRequest(dataset, workspace.root, chosen, **rest), on_progress)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _raw(workspace: Workspace) -> Path:
    return next(workspace.raw.iterdir())


def test_everything_that_planning_makes_is_written(planned: Workspace) -> None:
    result = _plan(planned)
    assert {path.name for path in result.folder.iterdir()} >= {
        "fingerprint.json",
        "dataset.json",
        "plans_nano.json",
        "splits",
    }
    assert (result.folder / "splits" / "default.json").is_file()
    assert find_plans(result.folder) == result.plans
    assert result.plans.semi_supervised.recommended_method == "fixmatch"
    assert result.data_folders == {}


def test_a_second_time_changes_nothing_and_reads_no_case(planned: Workspace) -> None:
    before = _tree(planned.root)
    scanned: list[str] = []
    _plan(planned, on_progress=lambda stage, case, *_: scanned.append(case))
    assert _tree(planned.root) == before
    assert scanned == []
    _plan(planned, on_progress=lambda stage, case, *_: scanned.append(case), verify_dataset_integrity=True)
    assert len(scanned) == 6


def test_patients_are_counted_and_not_their_scans(planned: Workspace) -> None:
    cases = sorted(path.name.split("_0000")[0] for path in (_raw(planned) / "imagesTr").iterdir())
    (_raw(planned) / "cases.csv").write_text("case,patient\n" + "".join(f"{case},P1\n" for case in cases))
    assert "2500 × 1 labeled patients" in _plan(planned, preset="plain").plans.why["semi_supervised.total_steps"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"configurations": ["3d_lowres"]}, "a coarser target spacing of 3d_fullres takes its place"),
        ({"configurations": ["3d_lowres"], "preset": "plain"}, "not planned: a patch of 3d_fullres covers"),
        ({"configurations": ["3d"]}, "configuration '3d' is unknown"),
        ({"preset": "nan"}, "preset 'nan' is unknown. Expected: one of nano"),
        ({"overwrite_target_spacing": [0.0, 1.0, 1.0]}, "three positive numbers z y x in mm"),
        ({"remap_labels": ["9"]}, "OLD=NEW"),
    ],
)
def test_what_cannot_be_done_leaves_the_workspace_as_it_was(
    workspace: Workspace, options: dict[str, object], message: str
) -> None:
    before = _tree(workspace.root)
    with pytest.raises(InvalidInput, match=message):
        _plan(workspace, **options)
    assert _tree(workspace.root) == before
    assert [path.name for path in workspace.root.iterdir()] == ["raw"]


def test_a_faulty_label_leaves_the_workspace_as_it_was_until_it_is_mapped(workspace: Workspace) -> None:
    label = next((_raw(workspace) / "labelsTr").iterdir())
    image: Any = nibabel.load(label)
    values = np.asarray(image.dataobj).copy()
    values[values == values.max()] = 7
    nibabel.save(nibabel.Nifti1Image(values, image.affine), label)
    with pytest.raises(InvalidInput, match=r"7.*--remap_labels"):
        _plan(workspace)
    assert [path.name for path in workspace.root.iterdir()] == ["raw"]
    assert _plan(workspace, remap_labels=("7=2",)).fingerprint.remap_labels == {7: 2}
    assert _plan(workspace).fingerprint.remap_labels == {7: 2}  # kept with the data set


def test_cases_are_preprocessed_once_for_what_is_asked(planned: Workspace) -> None:
    done: list[tuple[str, int, int]] = []
    result = _plan(
        planned,
        preprocess=True,
        configurations=("2d",),
        on_progress=lambda stage, _, *count: done.append((stage, *count)),
    )
    assert done == [("2d", number, 5) for number in range(1, 6)]  # the test case is left to prediction
    assert set(result.data_folders) == {"2d"}
    store = CaseStore(result.data_folders["2d"])
    assert all(store.has(case, labeled=True) for case in result.fingerprint.of_pool("labeled"))
    assert all(not store.label_path(case).exists() for case in result.fingerprint.of_pool("unlabeled"))
    before = _tree(result.folder)
    _plan(planned, preprocess=True, configurations=("2d",))
    assert _tree(result.folder) == before


def test_an_unknown_dataset_names_the_nearest(workspace: Workspace) -> None:
    with pytest.raises(InvalidInput, match="no dataset 'Phantm'"):
        plan_and_preprocess(PlanRequest("Phantm", workspace.root))


def test_plans_that_were_edited_are_kept_beside_the_new_ones(
    planned: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    result = _plan(planned)
    content = read_json(result.plans_file)
    content["configurations"]["2d"]["batch_size"] = 7
    write_json(result.plans_file, content)
    with caplog.at_level(logging.WARNING):
        assert _plan(planned).plans == result.plans
    assert read_json(result.folder / "replaced_plans_nano.json") == content
    assert "What differs: configurations.2d.batch_size" in caplog.text
    assert find_plans(result.folder).preset == "nano"  # the kept file is no plan


def test_default_preset(planned: Workspace, tmp_path: Path) -> None:
    folder = _plan(planned).folder
    assert find_plans(folder).preset == "nano"
    shutil.copyfile(plans_file(folder, "nano"), plans_file(folder, "resenc_m"))
    with pytest.raises(InvalidInput, match="planned for 2 presets: nano, resenc_m.*--preset"):
        find_plans(folder)
    _plan(planned, preset="plain")
    assert find_plans(folder).preset == "plain"
    assert find_plans(folder, "nano").preset == "nano"
    with pytest.raises(InvalidInput, match="not planned for preset 'nno'. Expected: one of nano"):
        find_plans(folder, "nno")
    with pytest.raises(InvalidInput, match="is not planned. .*autossl_plan_and_preprocess -d Dataset099_None"):
        find_plans(tmp_path / "Dataset099_None")


def test_plans_of_another_dataset_are_refused(planned: Workspace) -> None:
    result = _plan(planned)
    other = result.folder.with_name("Dataset777_Other")
    other.mkdir()
    (other / "plans_nano.json").write_text(json.dumps(result.plans.to_json()))
    with pytest.raises(InvalidInput, match=f"plans of {result.dataset_name} lie in the folder of Dataset777_Other"):
        find_plans(other)


def test_two_commands_do_not_prepare_one_dataset_at_once(planned: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    result = _plan(planned)
    lock, before = lock_beside(result.folder), _tree(planned.root)
    with hold(lock, "the preprocessing of it"):
        with pytest.raises(InvalidInput, match=rf"process {os.getpid()} .* works on the preprocessing of Dataset"):
            _plan(planned, preprocess=True)
        assert {name: content for name, content in _tree(planned.root).items() if not name.endswith(".lock")} == before
    held, raw = ExitStack(), read_raw_dataset(_raw(planned))
    held.enter_context(hold(lock, "the preprocessing of it"))
    threading.Timer(0.3, held.close).start()
    with caplog.at_level(logging.INFO):  # a run waits for what it needs as well
        made = preprocess_planned(raw, result.fingerprint, result.plans, ["2d"], result.folder, 1)
    assert f"waiting for {Holder.this_process().command} (process {os.getpid()}" in caplog.text
    assert len(list((made["2d"] / "images").glob("*.b2nd"))) == 5
    assert not lock.parent.exists()
