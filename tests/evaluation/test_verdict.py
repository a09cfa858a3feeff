"""The word and the figure behind it, and verdict.json from finished runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from autossl.cli import verdict as command
from autossl.data.problems import InvalidInput
from autossl.data.runs import CHECKPOINT_FINAL, RUN_FILE, RunSpec, run_folder
from autossl.data.splits import Split
from autossl.data.workspace import Workspace
from autossl.evaluation.judge_runs import Competitors, judge_runs, read_verdict
from autossl.evaluation.statistics import PairedSample
from autossl.evaluation.verdict import (
    Candidate,
    Cohort,
    Verdict,
    by_seed,
    judge,
    judge_pair,
    patient_means,
    wilcoxon_p,
    word_of,
)

FOLDS, EACH = 5, 4
CASES = tuple((str(fold), f"p{fold * EACH + n}") for fold in range(FOLDS) for n in range(EACH))
COHORT = Cohort(CASES, ("one", "two"))
NOISE = np.random.default_rng(0).normal(0, 0.01, (8, 1, len(CASES), 2))
BASE = 0.7 + np.random.default_rng(1).normal(0, 0.1, (1, len(CASES), 2))
FEW = 500


def candidate(name: str, gain: float = 0.0, noise: int = 0, twin: str = "") -> Candidate:
    return Candidate(name, BASE + gain + NOISE[noise], twin)


TWIN = candidate("twin", noise=7)


def verdict_of(gain: float) -> Verdict:
    return judge([candidate("method", gain)], [TWIN], COHORT, n_resamples=FEW)


# ------------------------------------------------------------------------------------------------------ word, sentence


@pytest.mark.parametrize(
    ("gain", "word", "said"),
    [
        (0.05, "helped", "The unlabeled cases helped."),
        (-0.05, "hurt", "The unlabeled cases hurt."),
        (0.0, "no evidence", "No evidence that the unlabeled cases helped."),
    ],
)
def test_the_word_follows_from_the_interval(gain: float, word: str, said: str) -> None:
    found = verdict_of(gain)
    assert found.word == word
    assert found.sentence.startswith(said)
    assert found.estimate == pytest.approx((BASE + gain + NOISE[0] - TWIN.dice).mean())
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.estimate < found.high
    assert found.recommended == ("method" if word == "helped" else "twin")
    assert ("The final model is the supervised ensemble" in found.sentence) == (word != "helped")
    assert all(figure.word == word for figure in found.per_class.values())
    assert f"{100 * found.low:+.2f} to {100 * found.high:+.2f}" in found.sentence


def test_better_is_never_said() -> None:
    for gain in (-0.05, -0.005, 0.0, 0.005, 0.05):
        assert "better" not in json.dumps(verdict_of(gain).model_dump()).lower()


def test_bounds_at_zero_are_no_evidence() -> None:
    assert word_of(0.0, 0.1, 20) == "no evidence"
    assert word_of(-0.1, 0.0, 20) == "no evidence"
    assert word_of(1e-9, 0.1, 8) == "helped"
    assert word_of(0.1, 0.2, 7) == "too few to tell"
    assert word_of(math.nan, math.nan, 20) == "too few to tell"


def test_seven_patients_are_too_few_and_eight_are_not() -> None:
    def of(n: int) -> Verdict:
        cohort = Cohort(CASES[:n], ("one", "two"))
        return judge([Candidate("method", BASE[:, :n] + 0.1)], [Candidate("twin", BASE[:, :n])], cohort)

    assert of(7).word == "too few to tell"
    assert "at least 8" in of(7).sentence
    assert of(7).estimate == pytest.approx(0.1)
    assert of(8).word == "helped"


def test_a_class_that_few_patients_have_is_too_few_to_tell() -> None:
    dice = BASE + 0.1
    dice[:, 7:, 1] = np.nan
    found = judge([Candidate("method", dice)], [TWIN], COHORT, n_resamples=FEW)
    assert found.per_class["one"].word == "helped"
    assert found.per_class["two"].word == "too few to tell"
    assert found.per_class["two"].n_patients == 7
    assert found.n_patients == 20


def test_wins_ties_and_losses_count_patients() -> None:
    gains = np.zeros((1, len(CASES), 2))
    gains[:, :5], gains[:, 5:8], gains[:, 8:] = 0.02, -0.02, 0.0005
    found = judge([Candidate("method", TWIN.dice + gains)], [TWIN], COHORT, n_resamples=FEW)
    assert (found.wins, found.ties, found.losses) == (5, 12, 3)


# --------------------------------------------------------------------------------------------------------------- notes


def test_it_says_what_is_not_in_the_interval() -> None:
    one_seed = verdict_of(0.05)
    assert any("training variance was not measured" in note for note in one_seed.notes)
    assert any("correlated" in note for note in one_seed.notes)
    two = [Candidate(c.name, np.concatenate([c.dice, c.dice])) for c in (candidate("method"), TWIN)]
    several = judge(two[:1], two[1:], COHORT, n_resamples=FEW)
    assert several.n_seeds == 2
    assert several.notes[0].startswith("2 seeds")


def test_the_seeds_of_a_training_that_varies_widen_the_interval() -> None:
    dice = np.concatenate([BASE + 0.05 + NOISE[0], BASE - 0.01 + NOISE[1]])
    twins = np.concatenate([TWIN.dice, TWIN.dice])
    found = judge([Candidate("method", dice)], [Candidate("twin", twins)], COHORT, n_resamples=2000)
    steady = judge(
        [Candidate("method", np.concatenate([BASE + 0.02 + NOISE[n] for n in (0, 1)]))],
        [Candidate("twin", twins)],
        COHORT,
        n_resamples=2000,
    )
    assert found.high - found.low > 2 * (steady.high - steady.low)  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------------- several


def test_the_best_of_several_is_judged_and_chosen_again() -> None:
    several = [candidate(f"m{n}", noise=n) for n in range(6)]
    means = [float(entry.dice.mean()) for entry in several]
    found = judge(several, [TWIN], COHORT, n_resamples=2000)
    alone = judge([several[int(np.argmax(means))]], [TWIN], COHORT, n_resamples=2000)
    assert found.chosen == f"m{np.argmax(means)}" == alone.chosen
    assert found.observed == alone.observed
    assert found.estimate < alone.estimate  # type: ignore[operator]
    assert any("Chosen among 6 with and 1 without" in note for note in found.notes)


def test_each_side_brings_its_best() -> None:
    found = judge(
        [candidate("method 2d", 0.1, 0, "twin 2d"), candidate("method 3d", 0.3, 1, "twin 3d")],
        [candidate("twin 2d", 0.0, 2), candidate("twin 3d", 0.4, 3)],
        COHORT,
        n_resamples=FEW,
    )
    assert (found.chosen, found.against, found.word) == ("method 3d", "twin 3d", "hurt")
    assert [(entry.name, entry.against, entry.word) for entry in found.comparisons] == [
        ("method 2d", "twin 2d", "helped"),
        ("method 3d", "twin 3d", "hurt"),
    ]


def test_wilcoxon_is_corrected_over_the_candidates() -> None:
    several = [candidate("a", 0.004, 0), candidate("b", 0.0, 1), candidate("c", 0.02, 2)]
    found = judge(several, [TWIN], COHORT, n_resamples=FEW).comparisons
    for entry, one in zip(found, several, strict=True):
        exact = stats.wilcoxon((one.dice - TWIN.dice)[0].mean(1)).pvalue
        assert entry.p_wilcoxon == pytest.approx(exact)
    assert found[2].p_holm == pytest.approx(3 * found[2].p_wilcoxon)  # type: ignore[operator]
    assert all(entry.p_holm >= entry.p_wilcoxon for entry in found)  # type: ignore[operator]


def test_equal_scores_have_p_1() -> None:
    assert wilcoxon_p(np.zeros(10)) == 1.0
    assert math.isnan(wilcoxon_p(np.zeros(0)))


def test_the_run_of_equal_time_stands_beside_and_decides_nothing() -> None:
    found = judge([candidate("method", 0.05)], [TWIN], COHORT, candidate("long", 0.1, 3), n_resamples=FEW)
    assert found.word == "helped"
    assert found.equal_time is not None
    assert (found.equal_time.name, found.equal_time.against, found.equal_time.word) == ("method", "long", "hurt")
    assert "equal wall time" in found.notes[-1]


def test_shapes_that_differ_and_nothing_defined_are_refused() -> None:
    with pytest.raises(ValueError, match=r"twin has Dice of shape .* expected \(1, 20, 2\)"):
        judge([candidate("method")], [Candidate("twin", BASE[:, :5])], COHORT)
    with pytest.raises(ValueError, match="twin has no defined Dice"):
        judge([candidate("method")], [Candidate("twin", np.full_like(BASE, np.nan))], COHORT)
    with pytest.raises(ValueError, match="0 candidates with"):
        judge([], [TWIN], COHORT)


# --------------------------------------------------------------------------------------------------------------- pairs


def test_a_paired_sample_is_judged_as_its_candidates_are() -> None:
    values = np.full((FOLDS, len(CASES), 2), np.nan)
    difference = BASE + 0.05 + NOISE[0] - TWIN.dice
    for number, (fold, _) in enumerate(CASES):
        values[int(fold), number] = difference[0, number]
    sample = PairedSample(values, tuple(("d", str(fold)) for fold in range(FOLDS)), CASES)
    assert by_seed(sample) == pytest.approx(difference)
    found, whole = judge_pair(sample, ("one", "two"), FEW), verdict_of(0.05)
    assert (found.low, found.high) == (pytest.approx(whole.low), pytest.approx(whole.high))
    assert found.word == whole.word


def test_the_mean_of_a_patient_is_over_its_scans_and_then_its_classes() -> None:
    values = np.array([[[0.2, 0.4], [0.4, np.nan], [np.nan, np.nan]]])
    assert patient_means(values, [("0", "a"), ("0", "a"), ("0", "b")]) == pytest.approx([(0.3 + 0.4) / 2])


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A dataset with 20 labeled cases in five folds; no runs."""
    place = Workspace(tmp_path)
    raw = place.raw / "Dataset001_X"
    for folder, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
        (raw / folder).mkdir(parents=True)
        for _, case in CASES:
            (raw / folder / f"{case}{suffix}.png").touch()
    description = {"channel_names": {"0": "US"}, "labels": {"background": 0, "one": 1, "two": 2}, "file_ending": ".png"}
    (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": len(CASES)}))
    split = Split(
        name="default",
        kind="default",
        added=(tuple(sorted(case for _, case in CASES)),),
        n_folds=FOLDS,
        assigned={case: int(fold) for fold, case in CASES},
    )
    path = place.preprocessed / "Dataset001_X" / "splits" / "default.json"
    path.parent.mkdir(parents=True)
    path.write_text(split.model_dump_json(by_alias=True))
    return place


def write_run(
    workspace: Workspace, method: str, gain: float, noise: int = 0, folds: int = FOLDS, **changes: object
) -> Path:
    values = {"dataset": "Dataset001_X", "split": "default", "configuration": "2d", "preset": "nano", "seed": 0}
    spec = RunSpec.model_validate({**values, "method": method, "plans_hash": "abc", "total_steps": 100, **changes})
    folder = run_folder(workspace, spec)
    for fold in range(folds):
        target = folder / f"fold_{fold}" / "validation"
        target.mkdir(parents=True)
        (folder / f"fold_{fold}" / CHECKPOINT_FINAL).touch()
        cases: dict[str, Mapping[str, Mapping[str, float]]] = {}
        for number, (own, case) in enumerate(CASES):
            if own == str(fold):
                dice = (BASE + gain + NOISE[noise])[0, number]
                cases[case] = {name: {"dice": float(dice[k])} for k, name in enumerate(("one", "two"))}
        (target / "summary.json").write_text(json.dumps({"cases": cases}))
    (folder / RUN_FILE).write_text(spec.model_dump_json())
    return folder


def test_finished_runs_become_verdict_json(workspace: Workspace) -> None:
    write_run(workspace, "supervised", 0.0, 7)
    write_run(workspace, "mean_teacher", 0.05)
    write_run(workspace, "supervised", 0.1, 3, tag="equal-time", total_steps=150)
    write_run(workspace, "fixmatch", 0.5, 1, folds=4)
    write_run(workspace, "cps", 0.5, 1, total_steps=200)
    found = judge_runs(workspace, "Dataset001_X", n_resamples=FEW)
    whole = judge([candidate("method", 0.05)], [TWIN], COHORT, n_resamples=FEW)
    assert (found.word, found.estimate) == (whole.word, pytest.approx(whole.estimate))
    assert found.low == pytest.approx(whole.low, abs=0.002)
    assert found.chosen == "2d nano mean_teacher"
    assert found.equal_time is not None
    assert found.equal_time.against == "2d nano supervised equal-time"
    assert found.runs["2d nano mean_teacher"].folders == ("Dataset001_X/default/2d__nano__mean_teacher__seed-0",)
    assert {entry.role for entry in found.runs.values()} == {"method", "twin", "equal time"}
    assert any("fixmatch" in text and "4 of 5 folds" in text for text in found.left_out)
    assert any("cps" in text and "total_steps 200, its twin has 100" in text for text in found.left_out)
    assert read_verdict(workspace.results_folder("Dataset001_X") / "default" / "verdict.json") == found


def test_seeds_are_paired(workspace: Workspace) -> None:
    for seed in (0, 1):
        write_run(workspace, "supervised", 0.0, 7 - seed, seed=seed)
        write_run(workspace, "mean_teacher", 0.05, seed, seed=seed)
    write_run(workspace, "supervised", 0.0, 3, seed=2)
    found = judge_runs(workspace, "Dataset001_X", n_resamples=FEW)
    assert found.n_seeds == 2
    differences = [NOISE[seed] + 0.05 - NOISE[7 - seed] for seed in (0, 1)]
    assert found.observed == pytest.approx(np.mean(differences))
    assert found.left_out == ("2d__nano__supervised__seed-2: not all competitors have seed 2",)


def test_postprocessing_is_a_candidate_of_both_sides(workspace: Workspace) -> None:
    write_run(workspace, "supervised", 0.0, 7)
    write_run(workspace, "mean_teacher", 0.05)
    better = {case: {"one": 0.99, "two": 0.99} for _, case in CASES}
    rules = {f"2d__nano__{method}__seed-0": better for method in ("supervised", "mean_teacher")}
    found = judge_runs(workspace, "Dataset001_X", competitors=Competitors(postprocessed=rules), n_resamples=FEW)
    assert found.chosen == "2d nano mean_teacher, postprocessed"
    assert found.against == "2d nano supervised, postprocessed"
    assert found.word == "no evidence"
    assert [entry.against for entry in found.comparisons] == [
        "2d nano supervised",
        "2d nano supervised, postprocessed",
    ]


def test_without_a_twin_nothing_is_judged_or_written(workspace: Workspace) -> None:
    write_run(workspace, "mean_teacher", 0.05)
    with pytest.raises(InvalidInput, match="no finished supervised twin of the same seed"):
        judge_runs(workspace, "Dataset001_X")
    assert not list(workspace.results.rglob("verdict.json"))


def test_other_cases_are_refused_and_their_runs_can_be_left_out(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = [write_run(workspace, "supervised", 0.0, 7), write_run(workspace, "cps", 0.02, 1)]
    folder = write_run(workspace, "mean_teacher", 0.05)
    path = folder / "fold_0" / "validation" / "summary.json"
    content = json.loads(path.read_text())
    content["cases"].pop("p0")
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match="other cases or folds than .*--runs"):
        judge_runs(workspace, "Dataset001_X")
    named = [*(run.name for run in rest), "--workspace", str(workspace.root)]
    assert command.main(["X", "--split", "default", "--runs", *named]) == 0
    assert "mean_teacher" not in capsys.readouterr().out
    assert command.main(["X", "--split", "default", "--runs", "nowhere", *named]) == 2
    assert "no run nowhere in split default" in capsys.readouterr().err


def test_only_what_is_asked_for_competes(workspace: Workspace) -> None:
    for method, noise in (("supervised", 7), ("mean_teacher", 0), ("cps", 1)):
        write_run(workspace, method, 0.05 * (method == "cps"), noise)
    found = judge_runs(workspace, "Dataset001_X", competitors=Competitors(methods=["mean_teacher"]), n_resamples=FEW)
    assert [entry.name for entry in found.comparisons] == ["2d nano mean_teacher"]


def test_the_command_prints_and_writes(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(workspace, "supervised", 0.0, 7)
    write_run(workspace, "mean_teacher", 0.05)
    assert command.main(["X", "--split", "default", "--workspace", str(workspace.root)]) == 0
    said = capsys.readouterr().out
    assert "The unlabeled cases helped." in said
    assert "training variance was not measured" in said
    assert "verdict.json" in said
    assert command.main(["X", "--split", "default", "-m", "cps", "--workspace", str(workspace.root)]) == 2
