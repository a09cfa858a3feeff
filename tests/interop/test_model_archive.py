"""A model that was shared predicts what it predicted before, and tells nothing of the cases it was made from."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from tiny_model import DATASET, tiny_plans, write_tiny_images, write_tiny_run

from autossl.cli import export_model as export_command
from autossl.cli import install_model as install_command
from autossl.data.files import write_json
from autossl.data.probabilities import probabilities_file, read_probabilities
from autossl.data.problems import InvalidInput
from autossl.data.provenance import Written
from autossl.data.runs import RunSpec, find_runs
from autossl.data.splits import Fold
from autossl.data.workspace import Workspace
from autossl.inference.checkpoint import read_checkpoint
from autossl.inference.inference_plan import InferencePlan, LabelBudget, PlanMember, write_inference_plan
from autossl.inference.model_folder import read_model
from autossl.inference.postprocess import Rule
from autossl.inference.predict import predict
from autossl.inference.request import PredictRequest
from autossl.interop.deployed import is_public, shared_run
from autossl.interop.model_archive import ExportRequest, ExportResult, export_model
from autossl.interop.model_install import InstallRequest, install_model

CASE, PATIENT = "case-of-Smith_07", "Smith, John"
FOLDS = {"0": Fold(labeled=(CASE, "b"), validation=("secret_3",), unlabeled=("u_1", "u_2"), excluded={"x_9": "twin"})}


def trained(tmp_path: Path, **changes: Any) -> Path:
    """results/DATASET/default with two runs, an inference plan and a verdict; returns it."""
    split = tmp_path / "there" / "results" / DATASET / "default"
    members = {"a": (("0", "1"), tiny_plans()), "b": (("0",), tiny_plans(spacing=(1.4, 1.0, 0.9)))}
    for seed, (name, (folds, plans)) in enumerate(members.items()):
        write_tiny_run(
            split / name,
            folds,
            plans.model_copy(update={"why": {"batch": "fits", "patch": f"seen in {CASE}", "reader": "/home/me/data"}}),
            method="mean_teacher",
            seed=seed,
            settings={"weights": "/home/me/photo.pth", "noise": 0.1},
        )
        run = json.loads((split / name / "run.json").read_text())
        cases = {fold: content.model_dump(mode="json") for fold, content in FOLDS.items()}
        write_json(split / name / "run.json", run | {"folds": cases})
        for fold in folds:
            add_training_state(split / name / f"fold_{fold}" / "checkpoint_final.pth")
    description = json.loads((split / "a" / "dataset.json").read_text())
    write_json(split / "a" / "dataset.json", description | {"training": [{"image": f"./imagesTr/{CASE}.nii.gz"}]})
    plan: dict[str, Any] = {
        "dataset": DATASET,
        "split": "default",
        "members": tuple(PlanMember(run=f"{DATASET}/default/{name}", folds=f) for name, (f, _) in members.items()),
        "combine": "mean_probabilities",
        "postprocessing": (Rule(kind="keep_largest", class_name="organ"),),
        "why": "the interval says so",
        "labels": LabelBudget(n_cases=2, n_patients=2),
        "dice": 0.8125,
        "written": Written.now(),
    }
    write_inference_plan(split / "inference_plan.json", InferencePlan(**plan | changes))
    write_verdict(split / "verdict.json")
    return split


def write_verdict(path: Path, **changes: Any) -> None:
    """As autossl_verdict writes it."""
    figure = {"word": "no evidence", "estimate": 0.012, "low": -0.01, "high": 0.03, "observed": 0.015}
    figure |= {"n_patients": 9, "wins": 5, "ties": 1, "losses": 3}
    content: dict[str, Any] = figure | {
        "sentence": "No evidence.",
        "notes": ["One seed.", f"{CASE} is an odd one"],
        "per_class": {"organ": figure},
        "chosen": "a",
        "against": "b",
        "recommended": "b",
        "comparisons": [],
        "n_folds": 5,
        "n_seeds": 1,
        "n_resamples": 10,
        "dataset": DATASET,
        "split": "default",
        "runs": {},
        "left_out": [],
        "written": Written.now().model_dump(),
    }
    write_json(path, content | changes)


def add_training_state(path: Path) -> None:
    """What training leaves besides the networks that predict."""
    content = torch.load(path, weights_only=True)  # no memory map of the file that is written next
    content["networks"]["teacher"] = {"weight": torch.ones(50_000)}
    content |= {"optimizers": {"sgd": {"momentum": torch.ones(50_000)}}, "memory": {"bank": torch.ones(9)}}
    torch.save(content, path)


def exported(tmp_path: Path, model: str | Path, **more: Any) -> ExportResult:
    return export_model(ExportRequest(model, tmp_path / "model.zip", tmp_path / "there", **more))


def predicted(tmp_path: Path, name: str, **more: Any) -> dict[str, np.ndarray]:
    """Label maps and probabilities of the cases."""
    images = write_tiny_images(tmp_path / "images", ["p", "q"])
    predict(PredictRequest(images, tmp_path / name, device="cpu", save_probabilities=True, **more))
    maps = {case: np.asarray(nibabel.load(tmp_path / name / f"{case}.nii.gz").dataobj) for case in ("p", "q")}
    return maps | {f"{c} p": read_probabilities(probabilities_file(tmp_path / name, c)) for c in ("p", "q")}


def assert_equal(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert set(one) == set(two)
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])
    assert len(np.unique(one["p"])) > 1  # an empty result would compare nothing


def test_an_ensemble_predicts_the_same_on_a_machine_without_the_dataset(tmp_path: Path) -> None:
    trained(tmp_path)
    before = predicted(tmp_path, "before", dataset="999", workspace=tmp_path / "there")
    exported(tmp_path, "Tiny")
    installed = install_model(InstallRequest(tmp_path / "model.zip", tmp_path / "here"))
    assert installed.folder == tmp_path / "here" / "results" / DATASET / "installed-default"
    assert_equal(before, predicted(tmp_path, "by-name", dataset="Tiny", workspace=tmp_path / "here"))
    assert_equal(before, predicted(tmp_path, "by-folder", model=installed.folder))
    assert sorted(path.name for path in installed.folder.parent.iterdir()) == ["installed-default"]


def test_weights_are_the_same_bits_and_only_those_that_predict(tmp_path: Path) -> None:
    split = trained(tmp_path)
    result = exported(tmp_path, split / "a")
    assert result.members == (("a", ("0", "1")),)
    assert result.n_bytes_left > 2 * 2 * 50_000 * 4
    installed = install_model(InstallRequest(tmp_path / "model.zip", tmp_path / "here"))
    for fold in ("0", "1"):
        before = read_checkpoint(split / "a" / f"fold_{fold}" / "checkpoint_final.pth")
        after = read_checkpoint(installed.folder / "a" / f"fold_{fold}" / "checkpoint_final.pth")
        assert set(after) == {"format", "networks", "prediction"}
        assert set(after["networks"]) == {"student"}
        pairs = after["networks"]["student"], before["networks"]["student"]
        assert list(pairs[0]) == list(pairs[1])
        assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[1])
        storages = [len({t.untyped_storage().data_ptr() for t in state.values()}) for state in pairs]
        assert storages[0] == storages[1]  # what names shared they share again
    before = predicted(tmp_path, "before", model=split / "a")
    assert_equal(before, predicted(tmp_path, "after", model=installed.folder / "a"))
    assert_equal(before, predicted(tmp_path, "by-name", dataset="Tiny", workspace=tmp_path / "here"))


def test_networks_of_a_modality_travel_with_the_model(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", plans=tiny_plans(n_channels=2))
    path = run / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    both = content["prediction"]["members"][0]
    one = dict(content["prediction"], members=[dict(both, name="second", channels=[1])])
    teacher = dict(content["prediction"], members=[dict(both, name="teacher")])
    networks = dict(content["networks"], teacher=content["networks"]["student"])
    single = write_tiny_run(tmp_path / "single") / "fold_0" / "checkpoint_final.pth"
    networks["second"] = read_checkpoint(single)["networks"]["student"]
    torch.save({**content, "networks": networks, "alternatives": {"second": one, "teacher": teacher}}, path)
    exported(tmp_path, run)
    installed = install_model(InstallRequest(tmp_path / "model.zip", tmp_path / "here"))
    after = read_checkpoint(installed.folder / "run" / "fold_0" / "checkpoint_final.pth")
    assert set(after["networks"]) == {"student", "second"}
    assert read_model(installed.folder / "run").separate_modalities() == [frozenset({1})]


def test_nothing_in_the_archive_names_a_case_a_patient_or_a_place(tmp_path: Path) -> None:
    split = trained(tmp_path, why=f"decided on {CASE} and others")
    raw = tmp_path / "there" / "raw" / DATASET
    write_json(raw / "dataset.json", json.loads((split / "a" / "dataset.json").read_text()))
    for folder, name in (("imagesTr", f"{CASE}_0000.nii.gz"), ("labelsTr", f"{CASE}.nii.gz")):
        (raw / folder).mkdir()
        (raw / folder / name).touch()
    (raw / "cases.csv").write_text(f'case,patient\n{CASE},"{PATIENT}"\n')
    write_verdict(split / "verdict.json", word="hurt", sentence=f"it hurt {PATIENT} most")
    summary = split / "a" / "fold_0" / "validation" / "summary.json"
    write_json(summary, {"predictions": "/home/me", "cases": {"secret_3": {"organ": {"dice": 0.75}}}})
    exported(tmp_path, "Tiny")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        texts = {name: archive.read(name).decode("utf-8", "replace") for name in archive.namelist()}
    assert len(texts) == 1 + 2 + 6 + 3
    for name, text in texts.items():
        for secret in (CASE, "secret_3", "u_1", "x_9", "Smith", "/home", "photo.pth", str(tmp_path)):
            assert secret not in text, (name, secret)
    plans = json.loads(texts["a/plans.json"])
    assert plans["why"] == {"batch": "fits"}
    assert json.loads(texts["a/run.json"])["settings"]["noise"] == 0.1
    assert "| organ | 0.750 | 1 |" in texts["model_card.md"]
    assert "**hurt**" in texts["model_card.md"]


def test_the_card_says_what_a_user_needs_to_know(tmp_path: Path) -> None:
    trained(tmp_path)
    exported(tmp_path, "Tiny")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        card = archive.read("model_card.md").decode()
    for part in (
        "organ (1), tumor (5)",
        "**no evidence**: +1.20 Dice points with unlabeled scans (95% interval -1.00 to +3.00), 9 patients",
        "- organ: no evidence; +1.20",
        "One seed.",
        "before postprocessing: 0.812",
        "Labels seen: 2 cases of 2 patients",
        "Unlabeled scans seen: 2",
        "method mean_teacher, configuration 3d_fullres, preset tiny, seed 1",
        "keep the largest component of organ",
        "the interval says so",
        f"autossl_predict -i IMAGES -o SEGMENTATIONS -d {DATASET}",
    ):
        assert part in card, part


def test_the_card_has_the_data_in_figures(tmp_path: Path) -> None:
    trained(tmp_path)
    case = {
        "pool": "labeled",
        "files": {},
        "spacing_zyx_mm": (2, 1, 1),
        "shape_zyx": (10, 20, 30),
        "shape_after_crop_zyx": (10, 20, 30),
        "relative_size_after_crop": 1,
        "intensity_quantiles": (),
        "class_voxels": {"organ": 500},
        "components": {},
        "ellipticity": {},
        "voxel_hash": "",
        "robust_hash": "",
    }
    other = case | {"pool": "unlabeled", "spacing_zyx_mm": (4, 1, 1), "class_voxels": {}}
    intensity = {"mean": 0, "std": 1, "min": -9, "max": 9, "median": 3, "percentile_00_5": -1, "percentile_99_5": 8}
    content = {
        "version": 1,
        "dataset_name": DATASET,
        "orientation": "RAS",
        "channel_names": {0: "MR"},
        "remap_labels": {},
        "labels": {"background": [0], "organ": [1], "tumor": [5]},
        "cases": {CASE: case, "hidden_1": other},
        "foreground_intensity_properties_per_channel": {"0": intensity},
        "duplicates": [],
        "domain_shift": [],
        "median_relative_size_after_cropping": 1,
    }
    write_json(tmp_path / "there" / "preprocessed" / DATASET / "fingerprint.json", content)
    exported(tmp_path, "Tiny")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        card = archive.read("model_card.md").decode()
    assert "1 labeled, 1 unlabeled cases" in card
    assert "Voxel spacing in mm: median 3 × 1 × 1; 2 to 4, 1 to 1, 1 to 1." in card
    assert "organ: in 1 labeled cases, median 1 mL." in card
    assert "Intensity of MR in the labeled structures: median 3, mostly -1 to 8." in card
    assert CASE not in card


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("a plain reason with 1/2 and 3 / 4", True),
        ("as in case_12", False),
        ("as in CASE_12.nii.gz", False),
        ("case_123 is another one", True),
        ("in /data/raw", False),
        ("in C:\\data", False),
        ("in ~/data", False),
        ("patient Q 7 was odd", False),
    ],
)
def test_texts_that_name_something_are_known(text: str, public: bool) -> None:
    assert is_public(text, {"case_12", "Q 7"}) is public


def test_run_files_travel_by_a_list_of_what_may() -> None:
    spec = RunSpec.model_validate(
        {
            "dataset": "D",
            "split": "default",
            "configuration": "2d",
            "preset": "p",
            "method": "m",
            "seed": 0,
            "plans_hash": "h",
            "total_steps": 1,
            "folds": FOLDS,
            "fold_facts": {"0": {"first": CASE}},
            "something_new": CASE,
            "settings": {"list": ["a/b", {"c": "C:\\d"}], "kind": "soft"},
        }
    )
    shared = shared_run(spec, "installed-x")
    assert CASE not in shared.model_dump_json()
    assert (shared.split, shared.plans_hash, shared.folds) == ("installed-x", "h", {})
    assert shared.settings == {"list": ["(a path, left out)", {"c": "(a path, left out)"}], "kind": "soft"}


def test_an_installed_model_is_no_run_of_the_split_it_came_from(tmp_path: Path) -> None:
    trained(tmp_path)
    exported(tmp_path, "Tiny")
    install_model(InstallRequest(tmp_path / "model.zip", tmp_path / "there"))
    runs = find_runs(Workspace(tmp_path / "there"), DATASET)
    assert [run.spec.split for run in runs] == ["default"] * 2 + ["installed-default"] * 2
    again = export_model(ExportRequest(runs[2].folder.parent, tmp_path / "again.zip"))
    assert again.members == (("a", ("0", "1")), ("b", ("0",)))
    other = install_model(InstallRequest(tmp_path / "again.zip", tmp_path / "third"))
    assert other.folder.name == "installed-default"
    assert "Labels seen: 2 cases of 2 patients" in other.card.read_text()


def test_folds_with_different_labels_are_not_shared_together(tmp_path: Path) -> None:
    write_tiny_run(tmp_path / "run", ("0", "1"), split="benchmark-8_draw-0")
    with pytest.raises(InvalidInput, match="trained with different labels"):
        exported(tmp_path, tmp_path / "run")
    exported(tmp_path, tmp_path / "run", folds=("1",))
    installed = install_model(InstallRequest(tmp_path / "model.zip", tmp_path / "here"))
    assert installed.members == ((installed.folder / "run", ("1",)),)


@pytest.mark.parametrize(
    ("output", "message"),
    [("model.tar", "ends in .zip"), ("there.zip", "there already"), ("folder.zip", "there already")],
)
def test_outputs_that_cannot_be(tmp_path: Path, output: str, message: str) -> None:
    run = write_tiny_run(tmp_path / "run")
    (tmp_path / "there.zip").touch()
    (tmp_path / "folder.zip").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInput, match=message):
        export_model(ExportRequest(run, tmp_path / output))
    assert sorted(tmp_path.rglob("*")) == before


def test_from_command_to_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_tiny_run(tmp_path / "run")
    assert export_command.main([str(run), str(tmp_path / "m.zip"), "-q"]) == 0
    assert "run: run, fold 0" in capsys.readouterr().out
    assert export_command.main([str(run), str(tmp_path / "m.zip"), "-q"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert export_command.main([str(run), str(tmp_path / "m.zip"), "-q", "--overwrite"]) == 0
    install = [str(tmp_path / "m.zip"), "--workspace", str(tmp_path / "w"), "-q"]
    assert install_command.main(install) == 0
    folder = tmp_path / "w" / "results" / DATASET / "installed-default"
    assert f"installed: {folder}" in capsys.readouterr().out
    assert install_command.main(install) == 0
    assert "was installed already" in capsys.readouterr().out
    assert install_command.main([*install, "--name", "other"]) == 0
    assert (folder.parent / "installed-other" / "model_card.md").is_file()
    assert export_command.main(["Nothing", str(tmp_path / "n.zip"), "--workspace", str(tmp_path / "w")]) == 2
