"""From finished run folders to the rows of a benchmark's table, its history and its timings."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
from made_up_runs import planned_run, write_fold, write_summary

from autossl.evaluation.benchmark.costs import seconds_per_step
from autossl.evaluation.benchmark.history import append_history, read_history
from autossl.evaluation.benchmark.provenance import package_commit
from autossl.evaluation.benchmark.request import PlannedRun
from autossl.evaluation.benchmark.results import Training, add_attempt, read_training
from autossl.evaluation.benchmark.tables import Row, build_rows
from autossl.version import __version__

CASES = [f"c{n}" for n in range(12)]
CLASSES = ["organ", "core"]


def training(
    run: PlannedRun, organ: float, core: float = 0.5, slope: float = 0.01, cases: list[str] = CASES
) -> Training:
    """A finished run whose organ scores rise from case to case."""
    write_fold(run, {case: {"organ": organ + slope * n, "core": core} for n, case in enumerate(cases)})
    return read_training(run)


def rows_of(*trainings: Training, wanted: int = 1, patients: dict[str, str] | None = None) -> dict[str, Row]:
    keys = {training.run.row: wanted for training in trainings}
    rows = build_rows(keys, trainings, CLASSES, patients or {})
    return {f"{row.key.method} {row.key.labeled or 'all'}": row for row in rows}


# ---------------------------------------------------------------------------------------------------------- readings


def test_a_finished_run_is_read_with_what_is_known_of_it(tmp_path: Path) -> None:
    run = planned_run(tmp_path)
    write_fold(run, {"a": {"organ": 0.8, "core": None}, "b": {"organ": 0.6, "core": 0.5}}, 700.0, 0.25)
    write_summary(run.fold_folder / "validation_teacher" / "summary.json", {"a": {"organ": 0.9}})
    found = read_training(run)
    assert run.is_finished
    assert found.dice["b"] == {"organ": 0.6, "core": 0.5}
    assert math.isnan(found.dice["a"]["core"])
    assert found.mean_dice == pytest.approx(0.6)
    assert found.alternatives == {"teacher": 0.9}
    assert found.peak_memory_mb == 800.0
    assert (found.commit, found.wall_seconds, found.wall_seconds_from) == (None, pytest.approx(25.0), "log")


def test_the_record_of_the_calls_that_trained_it_is_kept_beside_it(tmp_path: Path) -> None:
    run = planned_run(tmp_path)
    add_attempt(run.fold_folder, {"commit": "nothing was trained", "seconds": 1.0})
    assert not run.fold_folder.exists()
    write_fold(run, {"a": {"organ": 0.8}})
    for commit, seconds in (("one", 10.0), ("two", 5.5), ("two", 1.0)):
        add_attempt(run.fold_folder, {"commit": commit, "seconds": seconds})
    found = read_training(run)
    assert (found.commit, found.wall_seconds, found.wall_seconds_from) == ("one then two", 16.5, "record")


def test_a_run_without_scores_is_not_finished(tmp_path: Path) -> None:
    run = planned_run(tmp_path)
    write_fold(run, {"a": {"organ": 0.8}})
    run.summary.unlink()
    assert not run.is_finished


# -------------------------------------------------------------------------------------------------------------- rows


def test_a_row_is_the_mean_over_its_runs_and_cases_and_its_difference_is_paired(tmp_path: Path) -> None:
    twins = [training(planned_run(tmp_path, role="twin", seed=seed), 0.5 + 0.1 * seed) for seed in (0, 1)]
    methods = [training(planned_run(tmp_path, "m", seed=seed), 0.54 + 0.1 * seed) for seed in (0, 1)]
    rows = rows_of(*twins, *methods, wanted=2)
    twin, method = rows["supervised 8"], rows["m 8"]
    assert twin.dice == pytest.approx({"organ": 0.605, "core": 0.5})
    assert twin.mean_dice == pytest.approx(0.5525)
    assert twin.to_twin is None
    assert method.to_twin is not None
    found = method.to_twin.comparison
    assert (found.estimate, found.low, found.high) == pytest.approx(
        (0.02, 0.02, 0.02)
    )  # half of it is a core that stays
    assert found.estimate == pytest.approx(method.mean_dice - twin.mean_dice)
    assert (method.to_twin.n_pairs_of_runs, method.to_twin.n_cases) == (2, 12)
    assert method.to_twin.resampled == ("patients", "seeds")


def test_only_runs_with_a_finished_partner_are_compared(tmp_path: Path) -> None:
    twins = [training(planned_run(tmp_path, role="twin", seed=seed), 0.5) for seed in (0, 1)]
    method = training(planned_run(tmp_path, "m", seed=1), 0.6)
    lonely = training(planned_run(tmp_path, "n", seed=2), 0.6)
    rows = rows_of(*twins, method, lonely, wanted=2)
    assert rows["m 8"].to_twin is not None
    assert rows["m 8"].to_twin.n_pairs_of_runs == 1
    assert (len(rows["m 8"].trainings), rows["m 8"].n_wanted) == (1, 2)
    assert rows["n 8"].to_twin is None
    assert rows["n 8"].mean_dice > 0.5


def test_rows_without_a_run_stay_in_the_table(tmp_path: Path) -> None:
    twin = training(planned_run(tmp_path, role="twin"), 0.5)
    absent = planned_run(tmp_path, "m").row
    rows = build_rows({twin.run.row: 1, absent: 1}, [twin], CLASSES, {})
    assert (rows[1].trainings, rows[1].to_twin) == ((), None)
    assert math.isnan(rows[1].mean_dice)


def test_draws_and_folds_pair_with_their_own_twin(tmp_path: Path) -> None:
    places = [(draw, fold) for draw in (0, 1) for fold in ("0", "1")]
    trainings = []
    for number, (draw, fold) in enumerate(places):
        cases = [f"fold{fold}_{n}" for n in range(6)]
        twin = planned_run(tmp_path, role="twin", draw=draw, fold=fold)
        trainings.append(training(twin, 0.3 + 0.1 * number, cases=cases))
        trainings.append(training(planned_run(tmp_path, "m", draw=draw, fold=fold), 0.34 + 0.1 * number, cases=cases))
    found = rows_of(*trainings, wanted=4)["m 8"].to_twin
    assert found is not None
    assert (found.comparison.low, found.comparison.high) == pytest.approx((0.02, 0.02))
    assert (found.n_pairs_of_runs, found.n_cases, found.resampled) == (4, 12, ("patients", "draws"))


def test_scans_of_a_patient_are_one_patient(tmp_path: Path) -> None:
    twin, method = training(planned_run(tmp_path, role="twin"), 0.5), training(planned_run(tmp_path, "m"), 0.6)
    found = rows_of(twin, method, patients={case: f"p{n // 2}" for n, case in enumerate(CASES)})["m 8"].to_twin
    assert found is not None
    assert (found.n_cases, found.n_patients) == (12, 6)


def test_the_share_of_the_gap_is_that_of_the_differences(tmp_path: Path) -> None:
    twin = training(planned_run(tmp_path, role="twin"), 0.5)
    method = training(planned_run(tmp_path, "m"), 0.53)
    full = training(planned_run(tmp_path, role="full labels", labeled=None, draw=None), 0.6)
    rows = rows_of(twin, method, full)
    assert rows["m 8"].gap_closed == pytest.approx(0.3)
    assert rows["supervised all"].to_twin == rows["supervised 8"].gap
    assert rows["supervised all"].to_twin is not None
    assert rows["supervised all"].to_twin.comparison.estimate == pytest.approx(0.05)
    assert math.isnan(rows["supervised all"].to_twin.p_holm)


def test_without_a_sure_gap_there_is_no_share(tmp_path: Path) -> None:
    twin = training(planned_run(tmp_path, role="twin"), 0.5)
    method = training(planned_run(tmp_path, "m"), 0.53)
    full = training(planned_run(tmp_path, role="full labels", labeled=None, draw=None), 0.45, slope=0.02)
    assert math.isnan(rows_of(twin, method, full)["m 8"].gap_closed)
    assert math.isnan(rows_of(twin, method)["m 8"].gap_closed)


def test_each_budget_has_its_twin_its_gap_and_its_own_correction(tmp_path: Path) -> None:
    trainings = []
    for budget, base in (("4", 0.4), ("8", 0.5)):
        trainings.append(training(planned_run(tmp_path, role="twin", labeled=budget), base))
        trainings.append(training(planned_run(tmp_path, "m", labeled=budget), base + 0.04))
    trainings.append(training(planned_run(tmp_path, "n", labeled="8"), 0.54))
    trainings.append(training(planned_run(tmp_path, role="full labels", labeled=None, draw=None), 0.6))
    rows = rows_of(*trainings)
    assert rows["m 4"].gap_closed == pytest.approx(0.2)
    assert rows["m 8"].gap_closed == pytest.approx(0.4)
    assert rows["supervised all"].to_twin is None  # to which of the two?
    p_values = {name: row.to_twin.p_holm / row.to_twin.comparison.p for name, row in rows.items() if row.to_twin}
    assert p_values == pytest.approx({"m 4": 1.0, "m 8": 2.0, "n 8": 2.0})


def test_undefined_scores_are_left_out_on_both_sides(tmp_path: Path) -> None:
    twin, method = planned_run(tmp_path, role="twin"), planned_run(tmp_path, "m")
    write_fold(
        twin, {"a": {"organ": 0.5, "core": None}, "b": {"organ": 0.5, "core": 0.2}, "c": {"organ": 0.5, "core": 0.4}}
    )
    write_fold(
        method, {"a": {"organ": 0.6, "core": 0.0}, "b": {"organ": 0.6, "core": 0.4}, "c": {"organ": 0.6, "core": None}}
    )
    found = rows_of(read_training(twin), read_training(method))["m 8"].to_twin
    assert found is not None
    assert found.comparison.estimate == pytest.approx((0.1 + 0.2) / 2)


# ----------------------------------------------------------------------------------------------------------- history


def test_every_run_is_in_the_history_once(tmp_path: Path) -> None:
    runs = [planned_run(tmp_path, "m", seed=seed) for seed in (0, 1)]
    trainings = [training(run, 0.5) for run in runs]
    path = tmp_path / "deep" / "history.jsonl"
    assert append_history(path, trainings[:1], tmp_path) == 1
    assert append_history(path, trainings, tmp_path) == 1
    assert append_history(path, trainings, tmp_path) == 0
    lines = read_history(path)
    assert [line["seed"] for line in lines] == [0, 1]
    assert lines[0]["run"] == "Dataset001_X/benchmark-8_draw-0/2d__nano__m__seed-0"
    assert lines[0]["dice"] == pytest.approx({"organ": 0.555, "core": 0.5})
    assert {"date", "commit", "method", "settings", "fold", "labeled", "draw", "steps", "mean_dice"} <= set(lines[0])


def test_a_run_that_is_made_again_is_a_new_line_and_the_old_one_stays(tmp_path: Path) -> None:
    run, path = planned_run(tmp_path, "m"), tmp_path / "history.jsonl"
    append_history(path, [training(run, 0.5)], tmp_path)
    append_history(path, [training(run, 0.6)], tmp_path)
    add_attempt(run.fold_folder, {"commit": "two", "seconds": 3.0})
    append_history(path, [read_training(run)], tmp_path)
    lines = read_history(path)
    assert [line["commit"] for line in lines] == [None, None, "two"]
    assert lines[0]["mean_dice"] < lines[1]["mean_dice"] == lines[2]["mean_dice"]


def test_a_line_that_was_cut_off_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"run": "x"}\n{"run": "y')
    assert append_history(path, [training(planned_run(tmp_path), 0.5)], tmp_path) == 1
    assert [line["run"][-1] for line in read_history(path)] == ["x", "0"]
    assert path.read_text().startswith('{"run": "x"}\n{"run": "y\n{')


# ----------------------------------------------------------------------------------------------- timings, provenance


def test_a_step_s_time_is_the_median_of_each_phase_s_second_half() -> None:
    def lines(phase: str, start: int, seconds: list[float]) -> list[dict[str, object]]:
        return [{"phase": phase, "step": start + n, "steps_per_second": 1 / s} for n, s in enumerate(seconds, 1)]

    log = lines("first", 0, [9.0, 9.0, 1.0, 1.0]) + lines("second", 4, [5.0, 3.0])
    assert seconds_per_step(log) == pytest.approx((4 * 1.0 + 2 * 3.0) / 6)


def test_the_commit_is_named_only_where_the_package_is_part_of_the_checkout(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        options = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(
            ["git", *options, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    package = tmp_path / "autossl"
    package.mkdir()
    assert package_commit(package) == f"version {__version__}"
    (package / "version.py").write_text("1")
    git("init", "-q")
    assert package_commit(package) == f"version {__version__}"
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()[:10]
    (tmp_path / "notes.md").write_text("no module")
    assert package_commit(package) == commit
    (package / "version.py").write_text("2")
    assert package_commit(package) == f"{commit}+changes"


def test_a_row_names_what_its_runs_were_made_with(tmp_path: Path) -> None:
    runs = [training(planned_run(tmp_path, role="twin", seed=seed), 0.5) for seed in (0, 1)]
    add_attempt(runs[0].run.fold_folder, {"commit": "one", "seconds": 7.0})
    row = rows_of(read_training(runs[0].run), runs[1], wanted=2)["supervised 8"]
    assert row.commits == ["one", "unknown"]
    assert row.plans_hashes == ["abc"]
    assert row.wall_seconds == pytest.approx(7.0 + 50.0)
    assert row.peak_memory_mb == 600.0
