"""`autossl_label_next` on a planned phantom data set with networks that always say the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_model import make_constant, write_tiny_run

from autossl.cli.label_next import main
from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.problems import InvalidInput
from autossl.data.workspace import Workspace
from autossl.evaluation.label_evidence import LabelNextRequest, label_next
from autossl.networks.build import build_network
from autossl.planners.fingerprint import read_fingerprint
from autossl.planners.plan_and_preprocess import PlanRequest, plan_and_preprocess
from autossl.planners.plan_experiment import PlanOptions
from autossl.planners.plans import Plans

SETTINGS = PhantomSettings(n_labeled=3, n_unlabeled=3, n_test=1, shape_zyx=(6, 16, 16))
BACKGROUND, CAPSULE, CORE = 0, 1, 2

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plans]:
    workspace = Workspace(tmp_path_factory.mktemp("label_next"))
    make_phantom_dataset(workspace.raw, SETTINGS)
    options = PlanOptions(preset="nano", configurations=("2d",))
    result = plan_and_preprocess(PlanRequest(SETTINGS.name, workspace.root, options, n_workers=0))
    semi = result.plans.semi_supervised.model_copy(update={"recommended_configuration": "2d"})
    only_2d = {"2d": result.plans.configurations["2d"]}
    return workspace.root, result.plans.model_copy(update={"configurations": only_2d, "semi_supervised": semi})


@pytest.fixture
def workspace(planned: tuple[Path, Plans], tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(planned[0], tmp_path / "workspace"))


@pytest.fixture
def plans(planned: tuple[Path, Plans]) -> Plans:
    return planned[1]


def add_run(workspace: Workspace, plans: Plans, name: str, folds: dict[str, int], split: str = "default") -> Path:
    """Folds that say one class everywhere."""
    folder = workspace.results_folder(SETTINGS.name) / split / name
    constants = {fold: float(value) for fold, value in folds.items()}
    method = name.split("__")[2]
    write_tiny_run(folder, constants, plans, dataset=SETTINGS.name, method=method, split=split)
    shutil.copyfile(workspace.raw_folder(SETTINGS.name) / "dataset.json", folder / "dataset.json")
    return folder


def rank(workspace: Workspace, n: int = 2) -> dict:
    request = LabelNextRequest("Phantom", n, workspace.root, device="cpu")
    return json.loads(label_next(request).file.read_text())


def test_unlabeled_cases_are_ranked_with_what_the_networks_said(workspace: Workspace, plans: Plans) -> None:
    add_run(workspace, plans, "2d__nano__supervised__seed-0", {"0": CAPSULE, "1": CAPSULE})
    add_run(workspace, plans, "2d__nano__mean_teacher__seed-0", {"0": CAPSULE, "1": CORE})
    content = rank(workspace)
    fingerprint = read_fingerprint(workspace.preprocessed_folder(SETTINGS.name) / "fingerprint.json")
    unlabeled = fingerprint.of_pool("unlabeled")
    everyone = content["next"] + content["others"]
    assert {found["case"] for found in everyone} == set(unlabeled)
    assert [found["rank"] for found in everyone] == [1, 2, None]
    assert content["models"].keys() == {"2d__nano__supervised__seed-0", "2d__nano__mean_teacher__seed-0"}
    for found in everyone:
        entry = unlabeled[found["case"]]
        assert found["measured"]["fold_dice"] == 0.5, "folds of one run agree, of the other nowhere"
        assert found["measured"]["run_dice"] == 1.0, "a draw goes to the smaller value"
        z, y, x = entry.spacing_zyx_mm
        voxels = entry.shape_zyx[0] * entry.shape_zyx[1] * entry.shape_zyx[2]
        assert found["measured"]["volumes"]["capsule"] == pytest.approx(voxels * z * y * x, rel=1e-3)
        assert found["measured"]["volumes"]["core"] == 0
        assert any("much to outline: capsule" in reason for reason in found["reasons"])
    assert content["written"].keys() == {"date", "commit", "versions"}


def test_predictions_are_kept_until_the_weights_change(workspace: Workspace, plans: Plans) -> None:
    name = "2d__nano__supervised__seed-0"
    run = add_run(workspace, plans, name, {"0": CAPSULE, "1": CAPSULE})
    assert rank(workspace)["next"][0]["measured"]["fold_dice"] == 1.0
    folder = run.parent / "label_next" / name
    first, second = (sorted((folder / fold).glob("*.nii.gz")) for fold in ("fold_0", "fold_1"))
    assert len(first) == len(second) == 3
    before = {path: path.stat().st_mtime_ns for path in (*first, *second)}
    first[0].unlink()  # killed before the last case
    rank(workspace)
    assert {path: path.stat().st_mtime_ns for path in before if path != first[0]} == {
        path: stamp for path, stamp in before.items() if path != first[0]
    }
    weights = run / "fold_1" / "checkpoint_final.pth"
    content = torch.load(weights, weights_only=True)
    network = build_network(plans.configurations["2d"].architecture, 1, 3, seed=5)
    make_constant(network, CORE)
    torch.save(content | {"networks": {"student": network.state_dict()}}, weights)
    assert rank(workspace)["next"][0]["measured"]["fold_dice"] == 0.0


def test_what_cannot_be_ranked_is_refused_and_nothing_written(workspace: Workspace, plans: Plans) -> None:
    with pytest.raises(InvalidInput, match="0 trained networks.*at least two"):
        rank(workspace)
    add_run(workspace, plans, "2d__nano__supervised__seed-0", {"0": CAPSULE, "1": CAPSULE}, "benchmark-2_draw-0")
    add_run(workspace, plans, "2d__nano__supervised__seed-0", {"0": CAPSULE, "1": CAPSULE}, "benchmark-2_draw-1")
    with pytest.raises(InvalidInput, match="runs of 2 splits.*--draw"):
        rank(workspace)
    add_run(workspace, plans, "2d__nano__supervised__seed-0", {"0": CAPSULE, "1": CAPSULE})
    with pytest.raises(InvalidInput, match="-1 cases asked for"):
        rank(workspace, n=-1)
    shutil.rmtree(workspace.preprocessed_folder(SETTINGS.name) / "data")
    with pytest.raises(InvalidInput, match="3 of 3 unlabeled cases are not preprocessed"):
        rank(workspace)
    assert not list(workspace.results.rglob("label_next*"))


def test_copies_of_labeled_cases_and_of_test_cases_are_left_out(
    workspace: Workspace, plans: Plans, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = workspace.raw_folder(SETTINGS.name)
    labeled, test = (min((raw / folder).iterdir()) for folder in ("imagesTr", "imagesTs"))
    first, second, third = sorted((raw / "imagesUn").iterdir())
    shutil.copyfile(labeled, first)
    shutil.copyfile(test, second)
    options = PlanOptions(preset="nano", configurations=("2d",))
    plan_and_preprocess(PlanRequest(SETTINGS.name, workspace.root, options, n_workers=0))
    add_run(workspace, plans, "2d__nano__supervised__seed-0", {"0": CAPSULE, "1": BACKGROUND})
    assert main(["Phantom", "-n", "5", "--workspace", str(workspace.root), "--device", "cpu", "-q"]) == 0
    printed = capsys.readouterr().out
    names = [path.name.removesuffix("_0000.nii.gz") for path in (first, second, third)]
    assert "1 of 1 unlabeled cases, by 2 networks of 1 runs" in printed
    assert f"left out: {names[0]} (the same image as labeled case" in printed
    assert f"left out: {names[1]} (the same image as test case" in printed
    assert names[2] in printed
