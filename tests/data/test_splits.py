"""Splits: grouped by patient, never redrawn, nested draws, and nothing that leaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sklearn.model_selection import KFold

from autossl.data.draws import FOLD_SEED, budget_size, draw_folds, normal_budget
from autossl.data.hashes import DuplicatePair
from autossl.data.problems import InvalidInput
from autossl.data.splits import (
    Fold,
    Split,
    SplitCase,
    extend_default_split,
    fold_cases,
    load_or_make_split,
    make_benchmark_split,
    make_default_split,
    make_deployment_split,
)


def labeled(*ids: str, patient: str | None = None) -> list[SplitCase]:
    return [SplitCase(case, patient or case, "labeled") for case in ids]


def unlabeled(*ids: str) -> list[SplitCase]:
    return [SplitCase(case, case, "unlabeled") for case in ids]


TWENTY = labeled(*(f"c{i:02d}" for i in range(20)))

NNUNET_FOLDS_OF_20 = [[3, 8, 13, 16], [0, 10, 12, 15], [6, 7, 11, 17], [9, 14, 18, 19], [1, 2, 4, 5]]
DRAWS_OF_3 = [("c16", "c18", "c19"), ("c05", "c10", "c17"), ("c05", "c09", "c11")]
"""By the order of sha256("<draw>/<patient>")."""


def check_no_leak(split: Split, cases: list[SplitCase]) -> None:
    patient = {case.id: case.patient for case in cases}
    tests = {case.id for case in cases if case.pool == "test"}
    for fold in (*split.folds, split.everything):
        trained = {patient[case] for case in fold.labeled + fold.unlabeled}
        held = {patient[case] for case in {*fold.validation, *fold.hidden_test, *tests}}
        assert not trained & held


def test_default_folds_are_those_of_nnunet() -> None:
    """Expected: nnunetv2 2.8.1, generate_crossval_split(ids, seed=12345, n_splits=5) for 20 ids."""
    split = make_default_split(TWENTY)
    assert [[int(case[1:]) for case in fold.validation] for fold in split.folds] == NNUNET_FOLDS_OF_20
    assert all(len(fold.labeled) == 16 for fold in split.folds)
    assert split.everything.labeled == tuple(case.id for case in TWENTY)
    assert split.everything.validation == ()


@pytest.mark.parametrize(("n_cases", "n_folds"), [(2, 2), (7, 3), (11, 5), (24, 5), (260, 5), (301, 10)])
def test_folds_are_those_of_scikit_learn(n_cases: int, n_folds: int) -> None:
    ids = [f"case_{number:03d}" for number in range(n_cases)]
    expected = KFold(n_folds, shuffle=True, random_state=FOLD_SEED).split(ids)
    assert draw_folds(labeled(*reversed(ids)), n_folds) == {
        ids[index]: fold for fold, (_, chosen) in enumerate(expected) for index in chosen
    }


def test_patients_stay_together_and_limit_the_folds() -> None:
    cases = [*labeled("a1", "a2", "a3", patient="A"), *labeled("b1", patient="B"), *labeled("c1", "c2", patient="C")]
    split = make_default_split(cases)
    assert len(split.folds) == 3
    assert sorted(fold.validation for fold in split.folds) == [("a1", "a2", "a3"), ("b1",), ("c1", "c2")]
    check_no_leak(split, cases)


def test_one_patient_has_only_the_fold_of_everything() -> None:
    split = make_default_split(labeled("a1", "a2", patient="A"))
    assert fold_cases(split, "all").labeled == ("a1", "a2")
    with pytest.raises(InvalidInput, match=r"fold '0' is not in split default.*one of all; .*at least 2 patients"):
        fold_cases(split, 0)
    assert len(extend_default_split(split, [*labeled("a1", "a2", patient="A"), *labeled("b")]).folds) == 2


def test_unknown_fold_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"fold '7' is not in split default. Expected: one of 0, 1, 2, 3, 4, all"):
        fold_cases(make_default_split(TWENTY), 7)


def test_new_cases_are_appended_and_nothing_moves() -> None:
    first = make_default_split([*labeled("a1", patient="A"), *TWENTY])
    more = [*labeled("a1", "a2", patient="A"), *TWENTY, *labeled("n1", "n2", "n3", "n4")]
    second = extend_default_split(first, more)
    for before, after in zip(first.folds, second.folds, strict=True):
        assert set(before.validation) <= set(after.validation)
    assert second.assigned["a2"] == second.assigned["a1"]
    assert {len(fold.validation) for fold in second.folds} <= {5, 6}
    assert second.added[1:] == (("a2", "n1", "n2", "n3", "n4"),)
    check_no_leak(second, more)
    assert extend_default_split(second, more) == second


def test_a_case_that_leaves_and_returns_keeps_its_fold() -> None:
    first = make_default_split(TWENTY)
    without = extend_default_split(first, TWENTY[1:])
    assert all("c00" not in fold.validation + fold.labeled for fold in without.folds)
    assert extend_default_split(without, TWENTY) == first


@pytest.mark.parametrize("draw", [0, 1, 7])
def test_four_are_among_eight(draw: int) -> None:
    default = make_default_split(TWENTY)
    four, eight = (make_benchmark_split(default, TWENTY, n, draw) for n in (4, "8"))
    for fold_of_4, fold_of_8, fold in zip(four.folds, eight.folds, default.folds, strict=True):
        assert len(fold_of_4.labeled) == 4
        assert set(fold_of_4.labeled) < set(fold_of_8.labeled) < set(fold.labeled)
        assert fold_of_8.validation == fold.validation
        assert sorted(fold_of_8.labeled + fold_of_8.unlabeled) == sorted(fold.labeled)
    assert eight.name == f"benchmark-8_draw-{draw}"
    check_no_leak(eight, TWENTY)


def test_four_are_among_eight_though_cases_came_in_between() -> None:
    default = make_default_split(TWENTY)
    four = make_benchmark_split(default, TWENTY, 4)
    more = [*TWENTY, *labeled(*(f"n{i}" for i in range(30)))]
    eight = make_benchmark_split(extend_default_split(default, more), more, 8)
    assert all(set(a.labeled) < set(b.labeled) for a, b in zip(four.folds, eight.folds, strict=True))


def test_draws_differ_and_are_the_same_everywhere() -> None:
    default = make_default_split(TWENTY)
    drawn = [make_benchmark_split(default, TWENTY, 3, draw).everything.labeled for draw in range(3)]
    assert drawn == DRAWS_OF_3


def test_budgets() -> None:
    assert [normal_budget(value) for value in (8, "08", "0.20", ".5", 0.2, "1.0")] == [
        "8",
        "8",
        "0.2",
        "0.5",
        "0.2",
        "1.0",
    ]
    assert budget_size("0.07", 100, "") == 7  # 0.07 * 100 is 7.000000000000001 in floating point
    assert budget_size("0.2", 16, "") == 4
    for wrong in ("0", "-3", "1.5", "few", "0.0", "1/2", "nan", ""):
        with pytest.raises(InvalidInput, match=r"a label budget of .*such as 8, or with a point a fraction"):
            normal_budget(wrong)
    with pytest.raises(InvalidInput, match="a budget of 17 labeled cases, but fold 0 has 16. Expected: at most 16"):
        make_benchmark_split(make_default_split(TWENTY), TWENTY, 17)


def test_duplicates_and_scans_of_held_out_patients_are_kept_out() -> None:
    cases = [
        *labeled("v", patient="V"),
        *labeled("t1", "t2", "t3"),
        SplitCase("v_again", "V", "unlabeled"),
        SplitCase("same", "S", "unlabeled"),
        SplitCase("same_later", "S", "unlabeled"),
        *unlabeled("alike", "free"),
        SplitCase("test", "T", "test"),
        SplitCase("of_test", "T", "unlabeled"),
    ]
    duplicates = [
        DuplicatePair("same", "v", "identical", 1.0),
        DuplicatePair("alike", "v", "similar", 0.98),
        DuplicatePair("gone", "v", "identical", 1.0),
    ]
    split = make_default_split(cases, duplicates=duplicates)
    fold = next(fold for fold in split.folds if fold.validation == ("v",))
    assert fold.unlabeled == ("free",)
    assert fold.labeled == ("t1", "t2", "t3")
    assert fold.excluded == {
        "alike": "looks like validation case v (correlation 0.980)",
        "of_test": "another scan of the patient of test case test",
        "same": "the same image as validation case v",
        "same_later": "identical scans link its patient to that of validation case v",
        "v_again": "another scan of the patient of validation case v",
    }
    assert split.everything.excluded == {"of_test": "another scan of the patient of test case test"}
    check_no_leak(split, cases)


def test_labeled_duplicates_across_folds_leave_the_training_list() -> None:
    split = make_default_split(TWENTY, duplicates=[DuplicatePair("c00", "c01", "identical", 1.0)])
    assert split.assigned["c00"] != split.assigned["c01"]
    fold = split.folds[split.assigned["c00"]]
    assert fold.excluded == {"c01": "the same image as validation case c00"}
    assert "c01" not in fold.labeled + fold.unlabeled


def test_deployment_draws_once_and_hides_a_fifth_of_the_others() -> None:
    cases = [*TWENTY, *unlabeled("u1"), SplitCase("c00_later", "c00", "unlabeled")]
    split = make_deployment_split(cases, 10)
    drawn = set(split.everything.labeled)
    assert len(drawn) == 10
    assert len(split.hidden_test) == 2  # a fifth of 10
    assert set().union(*(fold.validation for fold in split.folds)) == drawn
    for fold in split.folds:
        assert set(fold.labeled) | set(fold.validation) == drawn
        assert (len(fold.labeled), fold.hidden_test) == (8, split.hidden_test)
        assert len(fold.unlabeled) >= 8  # 20 - 10 - 2 hidden labels, u1, and c00_later where c00 is not held out
    check_no_leak(split, cases)
    smaller = make_deployment_split(cases, 5)
    assert set(smaller.everything.labeled) < drawn
    assert set(split.hidden_test) < set(smaller.hidden_test)


def test_deployment_hides_no_patient_who_is_tied_to_a_drawn_one() -> None:
    without = make_deployment_split(TWENTY, 10)
    drawn, hidden = without.everything.labeled[0], without.hidden_test[0]
    split = make_deployment_split(TWENTY, 10, duplicates=[DuplicatePair(*sorted((drawn, hidden)), "similar", 0.97)])
    assert split.everything.labeled == without.everything.labeled
    assert hidden not in split.hidden_test
    assert len(split.hidden_test) == 2
    (last,) = make_deployment_split(TWENTY, 19).hidden_test
    pair = DuplicatePair(*sorted((drawn, last)), "similar", 0.97)
    assert make_deployment_split(TWENTY, 19, duplicates=[pair]).hidden_test == ()


def test_patients_that_become_known_later_move_nothing_but_leak_nothing() -> None:
    first = make_default_split(TWENTY)
    merged = [SplitCase(case.id, "P" if case.id in ("c00", "c01", "c03") else case.id, "labeled") for case in TWENTY]
    second = extend_default_split(first, merged)
    assert second.assigned == first.assigned
    check_no_leak(second, merged)


def test_files_are_written_once_and_read_again(tmp_path: Path) -> None:
    first = load_or_make_split(tmp_path, TWENTY, 4)
    path = tmp_path / "splits/benchmark-4_draw-0.json"
    assert sorted(p.name for p in path.parent.iterdir()) == ["benchmark-4_draw-0.json", "default.json"]
    before = path.stat().st_mtime_ns
    assert load_or_make_split(tmp_path, TWENTY, "4") == first
    assert path.stat().st_mtime_ns == before
    more = [*TWENTY, *labeled("n1"), *unlabeled("u")]
    second = load_or_make_split(tmp_path, more, 4)
    assert [fold.labeled for fold in second.folds] == [fold.labeled for fold in first.folds]
    assert {"n1", "u"} <= set(second.folds[0].unlabeled + second.folds[0].validation)
    assert json.loads(path.read_text())["all"]["labeled"] == list(first.everything.labeled)


def test_a_budget_that_cannot_be_met_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="lower --labeled"):
        load_or_make_split(tmp_path, TWENTY, 99)
    assert not list(tmp_path.iterdir())


def test_damaged_split_files(tmp_path: Path) -> None:
    load_or_make_split(tmp_path, TWENTY)
    path = tmp_path / "splits/default.json"
    content = json.loads(path.read_text())
    moved = content["folds"][0]["validation"].pop()
    content["folds"][1]["validation"].append(moved)
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=rf"folds.1.validation: {moved} not assigned to this fold.*edit 'assigned'"):
        load_or_make_split(tmp_path, TWENTY)
    content["assigned"][moved] = 1
    del content["folds"], content["all"]
    path.write_text(json.dumps(content))
    assert moved in load_or_make_split(tmp_path, TWENTY).folds[1].validation
    path.write_text('{"name": "default", ')
    with pytest.raises(InvalidInput, match=r"default.json: not valid JSON"):
        load_or_make_split(tmp_path, TWENTY)


def test_a_drawn_case_that_leaks_is_dropped_with_a_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    first = load_or_make_split(tmp_path, TWENTY, 4)
    drawn, validates = first.folds[0].labeled[0], first.folds[0].validation[0]
    pair = DuplicatePair(*sorted((drawn, validates)), "identical", 1.0)
    second = load_or_make_split(tmp_path, TWENTY, 4, duplicates=[pair])
    assert second.folds[0].labeled == first.folds[0].labeled[1:]
    assert f"fold 0: 1 drawn cases are missing or would leak, and are not replaced: {drawn}" in caplog.text
    assert load_or_make_split(tmp_path, TWENTY, 4) == first


def test_folds_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Fold(labeled=("a",)).labeled = ("b",)  # type: ignore[misc]
