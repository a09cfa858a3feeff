"""Planning again after labels came: folds and sizes stay, and only what is new is preprocessed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

import autossl.planners.plan_and_preprocess as plan_and_preprocess_module
from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.problems import InvalidInput
from autossl.data.splits import read_split
from autossl.data.workspace import Workspace
from autossl.planners.plan_and_preprocess import PlanRequest, PlanResult, find_plans, plan_and_preprocess
from autossl.planners.plan_experiment import PlanOptions
from autossl.trainers.setup import TrainRequest, resolve

SETTINGS = PhantomSettings(n_labeled=5, n_unlabeled=1, n_test=0, shape_zyx=(8, 16, 16))


@pytest.fixture(scope="module")
def planned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five labels, of which two wait beside the data set."""
    workspace = Workspace(tmp_path_factory.mktemp("grown"))
    raw = make_phantom_dataset(workspace.raw, SETTINGS)
    for label in sorted((raw / "labelsTr").iterdir())[3:]:
        (workspace.root / "labels").mkdir(exist_ok=True)
        shutil.move(label, workspace.root / "labels" / label.name)
        image = raw / "imagesTr" / label.name.replace(".nii.gz", "_0000.nii.gz")
        shutil.move(image, raw / "imagesUn" / image.name)
    plan(workspace)
    return workspace.root


@pytest.fixture
def workspace(planned_once: Path, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(planned_once, tmp_path / "workspace"))


def plan(workspace: Workspace, replan: bool = False, spacing: tuple[float, ...] | None = None) -> PlanResult:
    options = PlanOptions(preset="nano", configurations=("2d",), overwrite_target_spacing=spacing)
    return plan_and_preprocess(PlanRequest(SETTINGS.name, workspace.root, options, n_workers=0, replan=replan))


def label_next(workspace: Workspace) -> str:
    """The user labels a case: it moves with its image."""
    raw = workspace.raw_folder(SETTINGS.name)
    label = min((workspace.root / "labels").iterdir())
    case = label.name.removesuffix(".nii.gz")
    shutil.move(label, raw / "labelsTr" / label.name)
    shutil.move(raw / "imagesUn" / f"{case}_0000.nii.gz", raw / "imagesTr" / f"{case}_0000.nii.gz")
    return case


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_labels_that_come_leave_folds_sizes_and_data_as_they_were(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    folder = workspace.preprocessed_folder(SETTINGS.name)
    split, before, data = read_split(folder / "splits" / "default.json"), find_plans(folder), stamps(folder / "data")
    new = []
    for number in (4, 5):
        new.append(label_next(workspace))
        with caplog.at_level(logging.WARNING):
            result = plan(workspace)
        assert result.plans.configurations == before.configurations
        assert result.plans.transpose_forward == before.transpose_forward
        assert f"planned with 3 labeled cases (now {number})" in result.plans.why["configurations"]
        assert set(result.split.assigned.items()) >= set(split.assigned.items())
        assert set(result.split.assigned) - set(split.assigned) == set(new)
        assert result.split.n_folds == split.n_folds
    assert "Planning anew would change" in caplog.text
    after = stamps(folder / "data")
    assert {name: after[name] for name in data} == data, "what was preprocessed is not touched"
    assert {Path(name).parent.name for name in set(after) - set(data)} == {"labels", "locations"}
    assert plan(workspace).plans == result.plans, "once more changes nothing"


def test_sizes_are_made_anew_where_that_is_asked_for(workspace: Workspace) -> None:
    before = find_plans(workspace.preprocessed_folder(SETTINGS.name))
    label_next(workspace)
    result = plan(workspace, replan=True)
    assert result.plans.configurations["2d"].spacing != before.configurations["2d"].spacing
    assert "configurations" not in result.plans.why
    assert plan(workspace).plans == result.plans


def test_other_options_and_changed_labels_plan_anew(workspace: Workspace) -> None:
    label_next(workspace)
    assert plan(workspace, spacing=(4.0, 3.0, 3.0)).plans.configurations["2d"].spacing == (3.0, 3.0)
    assert "configurations" not in plan(workspace).plans.why, "the options of the last time do not hold any more"
    label_next(workspace)
    raw = workspace.raw_folder(SETTINGS.name)
    first = min((raw / "labelsTr").iterdir())
    other = sorted((raw / "labelsTr").iterdir())[1]
    (raw / "imagesTr" / first.name.replace(".nii.gz", "_0000.nii.gz")).unlink()
    first.unlink()
    assert other.exists()
    assert "configurations" not in plan(workspace).plans.why, "a case left"


def test_edited_plans_are_not_kept(workspace: Workspace) -> None:
    path = workspace.preprocessed_folder(SETTINGS.name) / "plans_nano.json"
    text = path.read_text().replace('"batch_size": ', '"batch_size": 1')
    path.write_text(text)
    label_next(workspace)
    assert "configurations" not in plan(workspace).plans.why
    assert path.with_name("replaced_plans_nano.json").exists()


def test_training_asks_for_planning_where_labels_came_since(workspace: Workspace) -> None:
    request = TrainRequest(SETTINGS.name, "2d", ("0",), workspace=workspace.root, device="cpu")
    case = label_next(workspace)
    before = stamps(workspace.root)
    with pytest.raises(InvalidInput, match=f"1 labeled cases came after .* was planned: {case}.*autossl_plan_and_pre"):
        resolve(request)
    assert stamps(workspace.root) == before
    plan(workspace)
    assert case in {*resolve(request).folds["0"].labeled, *resolve(request).folds["0"].validation}


@pytest.mark.parametrize("name", ["write_fingerprint", "write_plans", "_preprocess_planned"])
def test_planning_that_was_killed_between_its_files_ends_as_if_it_was_not(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The plans, and the basis that says from which cases they are, cannot be written in one step."""
    label_next(workspace)
    unbroken = plan(Workspace(shutil.copytree(workspace.root, workspace.root.with_name("unbroken"))))

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(plan_and_preprocess_module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            plan(workspace)
    again = plan(workspace)
    assert again.plans == unbroken.plans
    assert "planned with 3 labeled cases (now 4)" in again.plans.why["configurations"]
    bases = [result.plans_file.with_name("basis_of_plans_nano.json").read_text() for result in (again, unbroken)]
    assert bases[0] == bases[1]


def test_training_tells_of_plans_that_changed_since_they_were_planned(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    request = TrainRequest(SETTINGS.name, "2d", ("0",), workspace=workspace.root, device="cpu")
    resolve(request)
    assert "not as it was planned" not in caplog.text
    path = workspace.preprocessed_folder(SETTINGS.name) / "plans_nano.json"
    path.write_text(path.read_text().replace('"batch_size": ', '"batch_size": 1', 1))
    resolve(request)
    assert f"{path} is not as it was planned: edited by hand, or damaged" in caplog.text
