"""Weights to start from: which file a fold takes, what is recorded, and that validation cases stay unknown to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_model import DATASET, tiny_plans, write_tiny_run

from autossl.data.problems import InvalidInput
from autossl.data.runs import RunSpec, spec_differences
from autossl.data.splits import Fold
from autossl.networks.build import build_network
from autossl.trainers.base import Parts
from autossl.trainers.initial_weights import initial_checkpoint, initial_identity, initial_record

OLD = {"0": Fold(labeled=("a", "b"), validation=("c",)), "1": Fold(labeled=("b", "c"), validation=("a",))}


def parts() -> Parts:
    (plan,) = tiny_plans().configurations.values()
    return Parts(trained={"student": build_network(plan.architecture, plan.n_channels, 3, seed=9)})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_tiny_run(tmp_path / "default" / "old", ("0", "1"))
    set_run(folder, folds={key: fold.model_dump(mode="json") for key, fold in OLD.items()})
    return folder


def set_run(folder: Path, **values: object) -> None:
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(content | values))


def test_each_fold_starts_from_its_own_fold_of_a_run(run: Path) -> None:
    assert initial_checkpoint(run, "1") == run / "fold_1" / "checkpoint_final.pth"
    file = run / "fold_0" / "checkpoint_final.pth"
    assert initial_checkpoint(file, "1") == file
    with pytest.raises(InvalidInput, match="no finished fold 2.*one of its finished folds: 0, 1"):
        initial_checkpoint(run, "2")


def test_the_record_names_what_matched_and_what_was_seen(run: Path) -> None:
    fresh = parts()
    before = fresh.trained["student"].state_dict()
    record = initial_record(fresh, run, "0", Fold(labeled=("a", "b", "n"), validation=("c", "m")), DATASET)
    assert (record["run"], record["fold"], record["seen"]) == ("default/old", "0", ["a", "b"])
    assert record["matched"]["student"] == {"loaded": len(before), "other_shape": [], "not_in_file": []}
    stored = torch.load(run / "fold_0" / "checkpoint_final.pth", weights_only=True)["networks"]["student"]
    assert all(torch.equal(value, stored[name]) for name, value in fresh.trained["student"].state_dict().items())


@pytest.mark.parametrize(
    ("cases", "leaked"),
    [
        (Fold(labeled=("c",), validation=("b",)), "b"),
        (Fold(labeled=("c",), hidden_test=("a",)), "a"),
        (Fold(labeled=("c",), excluded={"a": "another scan of the patient of validation case d"}), "a"),
        (Fold(labeled=("a", "b"), validation=("u",)), "u"),
        (Fold(labeled=("a", "b"), validation=("z",)), "z"),
    ],
)
def test_weights_that_saw_a_case_the_fold_keeps_out_are_refused(run: Path, cases: Fold, leaked: str) -> None:
    folds = {"0": Fold(labeled=("a", "b"), unlabeled=("u",)).model_dump(mode="json")}
    set_run(run, folds=folds, initial={"0": {"seen": ["z"]}}, method="mean_teacher")
    with pytest.raises(InvalidInput, match=rf"1 cases that fold 0 keeps out .*: {leaked}\."):
        initial_record(parts(), run, "0", cases, DATASET)


def test_a_supervised_run_has_not_seen_its_unlabeled_cases(run: Path) -> None:
    set_run(run, folds={"0": Fold(labeled=("a", "b"), unlabeled=("u",)).model_dump(mode="json")})
    record = initial_record(parts(), run, "0", Fold(labeled=("a", "b"), validation=("u",)), DATASET)
    assert record["seen"] == ["a", "b"]


def test_cases_of_another_dataset_are_other_cases(run: Path) -> None:
    record = initial_record(parts(), run, "0", Fold(labeled=("c",), validation=("b",)), "Dataset123_Other")
    assert record["seen"] == []


def test_a_file_outside_of_a_run_is_taken_and_its_cases_are_unknown(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "weights.pth"
    copy.write_bytes((run / "fold_0" / "checkpoint_final.pth").read_bytes())
    record = initial_record(parts(), copy, "0", Fold(labeled=("c",), validation=("b",)), DATASET)
    assert (record["run"], record["fold"], record["seen"]) == (None, None, None)
    assert "cannot be checked" in caplog.text


def test_the_starting_point_is_part_of_the_runs_identity(run: Path) -> None:
    first = initial_identity(run)
    set_run(run, folds={})
    assert initial_identity(run) == first, "folds that are trained later do not change what the run is"
    set_run(run, seed=1)
    assert initial_identity(run) != first
    asked, stored = (spec_started_from(run, digest) for digest in ("abc", "def"))
    (problem,) = spec_differences(stored, asked, [])
    assert "folds.0 started from the weights def, abc was asked for" in problem.found
    assert not spec_differences(stored, stored, [])


def spec_started_from(run: Path, digest: str) -> RunSpec:
    content = json.loads((run / "run.json").read_text())
    return RunSpec.model_validate(content | {"initial": {"0": {"hash": digest}}})


def test_a_setting_that_came_later_does_not_tell_runs_apart_at_its_default() -> None:
    known = RunSpec(
        dataset=DATASET, split="s", configuration="c", preset="p", method="m", seed=0, plans_hash="", total_steps=1
    )
    later = known.model_copy(update={"settings": {"new": 1}})
    assert spec_differences(known, later, []) == []
    changed = later.model_copy(update={"changed_settings": {"new": 1}})
    assert [problem.found for problem in spec_differences(known, changed, [])] == [
        "settings.new is nothing in run.json, 1 was asked for"
    ]
