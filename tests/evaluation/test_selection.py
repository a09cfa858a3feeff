"""The choice of the final model: from scores, and from runs on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import numpy.typing as npt
import pytest
from tiny_model import DATASET, tiny_plans, write_tiny_images, write_tiny_run

from autossl.cli import find_best_configuration as command
from autossl.data.files import write_json
from autossl.data.image_io import read_geometry, read_label, write_label_map
from autossl.data.labels import LabelSchema
from autossl.data.probabilities import labels_of, probabilities_file, quantize, write_probabilities_quantized
from autossl.data.problems import InvalidInput
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.runs import FoundRun, RunSpec, read_run
from autossl.data.splits import load_or_make_split, split_cases
from autossl.data.workspace import Workspace
from autossl.evaluation.evaluate import EvaluationOptions, evaluate_folder
from autossl.evaluation.judge_runs import judge_runs
from autossl.evaluation.metrics import dice_per_class
from autossl.evaluation.out_of_fold import OutOfFoldCase
from autossl.evaluation.selection import selection
from autossl.evaluation.selection.candidates import Candidate, ScoredCandidates
from autossl.evaluation.selection.choose import Choice, Wish, choose
from autossl.evaluation.selection.selection import Selection, SelectionOptions, find_best_configuration, select_again
from autossl.evaluation.statistics import PairedSample, compare_paired
from autossl.inference.inference_plan import read_inference_plan, set_postprocessing
from autossl.inference.postprocess import Rule

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """Stands in for a verdict."""

    word: str
    sentence: str = "It is so."


def run_of(method: str) -> FoundRun:
    names = {"dataset": DATASET, "split": "default", "configuration": "2d", "preset": "nano", "method": method}
    spec = RunSpec.model_validate(names | {"seed": 0, "plans_hash": "x", "total_steps": 1})
    return FoundRun(Path(f"2d__nano__{method}__seed-0"), spec)


def scored(singles: dict[str, Array], ensembles: dict[tuple[str, str], Array]) -> ScoredCandidates:
    """Scores [cases] of one class; each case a patient, five folds."""
    n_cases = len(next(iter(singles.values())))
    cases = [OutOfFoldCase(f"c{n}", f"p{n}", str(n % 5), Path(), None, Path()) for n in range(n_cases)]
    return ScoredCandidates(
        tuple(cases),
        ("organ",),
        tuple(Candidate((run_of(name),), dice[:, None]) for name, dice in singles.items()),
        tuple(Candidate(tuple(map(run_of, names)), dice[:, None]) for names, dice in ensembles.items()),
    )


def with_gain(gain: float, spread: float, n: int = 20, seed: int = 0) -> ScoredCandidates:
    """Two single models, mean_teacher 2 points above supervised, and their ensemble above mean_teacher by `gain`."""
    generator = np.random.default_rng(seed)
    base = 0.8 + 0.05 * generator.standard_normal(n)
    noise = spread * generator.standard_normal(n)
    singles = {"supervised": base, "mean_teacher": base + 0.02}
    return scored(singles, {("supervised", "mean_teacher"): base + 0.02 + gain + noise - noise.mean()})


def names_of(choice: Choice) -> list[str]:
    return [run.spec.method for run in choice.chosen.candidate.runs]


# ------------------------------------------------------------------------------------------------------------ choosing


def test_an_ensemble_is_taken_where_its_interval_lies_above_zero() -> None:
    choice = choose(with_gain(0.01, 0.005))
    assert names_of(choice) == ["supervised", "mean_teacher"]
    assert choice.advantage is not None
    assert choice.advantage.observed == pytest.approx(0.01)
    assert choice.advantage.estimate == pytest.approx(0.01, abs=1e-4)  # the resamples' mean is not exactly zero
    assert choice.advantage.low > 0
    assert choice.why.startswith(choice.chosen.candidate.name)
    assert "points (+0." in choice.why


def test_an_ensemble_with_a_higher_mean_is_not_taken_where_its_interval_holds_zero() -> None:
    choice = choose(with_gain(0.01, 0.05))
    assert choice.ranked[0].candidate.name == "2d__nano__supervised__seed-0 + 2d__nano__mean_teacher__seed-0"
    assert names_of(choice) == ["mean_teacher"]
    assert "does not lie above zero" in choice.why
    assert "better" not in choice.why
    assert names_of(choose(with_gain(0.01, 0.05), Wish(ensemble=True))) == ["supervised", "mean_teacher"]


def test_without_ensembles_the_single_model_with_the_highest_mean_is_taken() -> None:
    choice = choose(with_gain(0.01, 0.005), Wish(ensemble=False))
    assert names_of(choice) == ["mean_teacher"]
    assert choice.advantage is None


def test_few_patients_prefer_no_ensemble() -> None:
    assert names_of(choose(with_gain(0.01, 0.001, n=7))) == ["mean_teacher"]
    assert names_of(choose(with_gain(0.01, 0.001, n=8))) == ["supervised", "mean_teacher"]


def test_the_ranking_is_by_pooled_dice_and_the_interval_is_around_it() -> None:
    choice = choose(with_gain(-0.01, 0.0))
    means = [one.interval.observed for one in choice.ranked]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[2] == pytest.approx(0.02)
    for one in choice.ranked:
        assert one.interval.low < one.interval.observed < one.interval.high
        assert one.interval.observed == pytest.approx(one.candidate.dice.mean())


def test_the_luck_of_choosing_among_many_ensembles_is_in_the_interval() -> None:
    """The best of many ensembles that gain nothing: its own paired interval says that it does."""
    generator = np.random.default_rng(3)
    base = 0.8 + 0.05 * generator.standard_normal(20)
    names = [f"m{n}" for n in range(16)]
    ensembles = {(one, names[0]): base + 0.02 * generator.standard_normal(20) for one in names[1:]}
    candidates = scored(dict.fromkeys(names, base), ensembles)
    best = max(ensembles.values(), key=np.mean)
    alone = compare_paired(PairedSample((best - base)[None, :, None], (("d", "0"),), tuple(candidates.units)))
    assert alone.low > 0
    choice = choose(candidates)
    assert choice.advantage is not None
    assert choice.advantage.observed == pytest.approx(alone.estimate)
    assert choice.advantage.estimate < alone.estimate
    assert choice.advantage.low < 0
    assert len(choice.chosen.candidate.runs) == 1


@pytest.mark.parametrize("word", ["no evidence", "hurt", "too few to tell"])
def test_a_verdict_that_did_not_help_makes_the_final_model_supervised(word: str) -> None:
    candidates = with_gain(0.01, 0.005)
    choice = choose(candidates, verdict=Judged(word))
    assert names_of(choice) == ["supervised"]
    assert f"'{word}', so the final model is supervised" in choice.why
    assert "It is so." in choice.why
    assert len(choice.ranked) == 3  # the others are shown all the same
    named = choose(candidates, Wish(methods=("mean_teacher",)), Judged(word))
    assert names_of(named) == ["mean_teacher"]
    assert named.why.startswith("The user asked for mean_teacher.")


def test_a_verdict_that_helped_leaves_the_choice_to_the_scores() -> None:
    assert names_of(choose(with_gain(0.01, 0.005), verdict=Judged("helped"))) == ["supervised", "mean_teacher"]


def test_cases_where_a_class_is_nowhere_do_not_count() -> None:
    candidates = with_gain(0.0, 0.0)
    for one in (*candidates.singles, *candidates.ensembles):
        one.dice[3] = np.nan
    choice = choose(candidates)
    defined = np.delete(candidates.singles[1].dice, 3)
    assert choice.chosen.interval.observed == pytest.approx(defined.mean())


# ------------------------------------------------------------------------------------------------------------- on disk

SCHEMA = LabelSchema({"background": (0,), "organ": (1,), "tumor": (5,)})
CASES = [f"k{n}" for n in range(10)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A dataset of 10 patients and three runs, predicted out of fold: supervised and mean_teacher with independent
    errors, and uamt with a fold unfinished."""
    workspace = Workspace(tmp_path_factory.mktemp("made"))
    raw = workspace.raw / DATASET
    write_tiny_images(raw / "imagesTr", CASES)
    (raw / "labelsTr").mkdir()
    generator = np.random.default_rng(0)
    truth = {}
    for case in CASES:
        geometry = read_geometry(raw / "imagesTr" / f"{case}_0000.nii.gz", "native")
        truth[case] = generator.choice([0, 1, 5], geometry.shape_zyx, p=(0.5, 0.3, 0.2)).astype(np.uint8)
        write_label_map(raw / "labelsTr" / f"{case}.nii.gz", truth[case], geometry)
    labels = {"background": 0, "organ": 1, "tumor": 5}
    write_json(
        raw / "dataset.json",
        {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": len(CASES), "file_ending": ".nii.gz"},
    )
    split = load_or_make_split(workspace.preprocessed / DATASET, split_cases(read_raw_dataset(raw)))
    folds = {str(number): fold for number, fold in enumerate(split.folds)}
    for method, noise in (("supervised", 0.55), ("mean_teacher", 0.5), ("uamt", 0.4)):
        folder = workspace.results_folder(DATASET) / "default" / f"3d_fullres__tiny__{method}__seed-0"
        write_tiny_run(folder, list(folds), tiny_plans(), method=method)
        write_json(folder / "run.json", read_run(folder).model_copy(update={"folds": folds}).model_dump(mode="json"))
        for fold, cases in folds.items():
            write_validation(folder / f"fold_{fold}" / "validation", cases.validation, truth, raw, noise, generator)
    (folder / "fold_3" / "checkpoint_final.pth").rename(folder / "fold_3" / "checkpoint_latest.pth")
    return workspace


def write_validation(
    folder: Path, cases: Sequence[str], truth: dict[str, Any], raw: Path, noise: float, generator: np.random.Generator
) -> None:
    """The truth with noise on its probabilities, scored."""
    for case in cases:
        right = np.stack([truth[case] == value for value in (0, 1, 5)]).astype(np.float32)
        values = np.clip(right + noise * generator.standard_normal(right.shape), 0.01, None)
        probabilities = (values / values.sum(0)).astype(np.float32)
        path = raw / "labelsTr" / f"{case}.nii.gz"
        write_label_map(folder / path.name, labels_of(probabilities, SCHEMA), read_geometry(path, "native"))
        write_probabilities_quantized(probabilities_file(folder, case), quantize(probabilities, keep_largest=True))
    evaluation = evaluate_folder(folder, raw / "labelsTr", SCHEMA, EvaluationOptions(cases=cases))
    write_json(folder / "summary.json", evaluation.to_json())


@pytest.fixture
def split_folder(made: Workspace) -> Any:
    """Of the default split; what a test writes there is removed after it."""
    folder = made.results_folder(DATASET) / "default"
    yield folder
    for path in folder.glob("*.json"):
        path.unlink()


def found(workspace: Workspace, **options: Any) -> Selection:
    return find_best_configuration(workspace, DATASET, SelectionOptions(**options))


def test_runs_and_pairs_are_scored_and_the_plan_is_written(made: Workspace, split_folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    result = find_best_configuration(made, DATASET, progress=lambda *at: told.append(at))
    assert told[-1] == ("score ensembles", len(CASES), len(CASES))
    names = [f"3d_fullres__tiny__{method}__seed-0" for method in ("mean_teacher", "supervised")]
    assert [one.candidate.name for one in result.choice.ranked] == [" + ".join(names), *names]
    assert result.plan == read_inference_plan(split_folder / "inference_plan.json")
    assert [member.run for member in result.plan.members] == [f"{DATASET}/default/{name}" for name in names]
    assert result.plan.members[0].folds == ("0", "1", "2", "3", "4")
    assert result.plan.combine == "mean_probabilities"
    assert (result.plan.labels.n_cases, result.plan.labels.n_patients) == (10, 10)
    content = json.loads((split_folder / "selection.json").read_text())
    assert list(content["left_out"]) == ["3d_fullres__tiny__uamt__seed-0"]
    assert "fold 3 is unfinished" in content["left_out"]["3d_fullres__tiny__uamt__seed-0"]
    assert content["chosen"] == content["candidates"][0]["name"]
    means = [np.mean([list(case.values()) for case in entry["cases"].values()]) for entry in content["candidates"]]
    assert means == pytest.approx([entry["dice"]["observed"] for entry in content["candidates"]])


def test_the_numbers_can_be_made_again_from_the_predictions(made: Workspace, split_folder: Path) -> None:
    for options in ({}, {"verdict": Judged("no evidence")}):
        found(made, **options)
        stored = json.loads((split_folder / "selection.json").read_text())
        again = select_again(made, DATASET, "default", stored)
        assert again["candidates"] == {entry["name"]: entry for entry in stored["candidates"]}
        assert again.get("ensemble_minus_single") == stored["ensemble_minus_single"]
        assert len(stored["up_for_choice"]) == (1 if options else 3)


def test_an_ensemble_is_scored_as_the_mean_of_its_probabilities(made: Workspace, split_folder: Path) -> None:
    result = found(made)
    (ensemble,) = result.scored.ensembles
    case = result.scored.cases[4]
    folders = [run.folder / f"fold_{case.fold}" / "validation" for run in ensemble.runs]
    members = [blosc2.open(str(probabilities_file(folder, case.case)))[:].astype(int) for folder in folders]
    label_map = np.array([0, 1, 5], dtype=np.uint8)[sum(members).argmax(0)]
    expected = dice_per_class(label_map, read_label(case.reference, "native")[0], SCHEMA)
    assert ensemble.dice[4].tolist() == pytest.approx(list(expected.values()))


def test_rules_stay_while_the_members_stay(made: Workspace, split_folder: Path) -> None:
    rule = Rule(kind="keep_largest", class_name="organ")
    set_postprocessing(found(made).path, [rule])
    assert found(made).plan.postprocessing == (rule,)
    assert found(made, wish=Wish(ensemble=False)).plan.postprocessing == ()


def test_the_verdict_on_disk_counts_unless_another_is_given(made: Workspace, split_folder: Path) -> None:
    path = split_folder / "verdict.json"
    judge_runs(made, DATASET, n_resamples=200)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"word": "no evidence"}))
    assert [member.name for member in found(made).plan.members] == ["3d_fullres__tiny__supervised__seed-0"]
    assert len(found(made, verdict=Judged("helped")).plan.members) == 2
    path.write_text('{"word": "good", "sentence": ""}')
    with pytest.raises(InvalidInput, match="the verdict cannot be read"):
        found(made)


def test_runs_can_be_named(made: Workspace, split_folder: Path) -> None:
    result = found(made, runs=("3d_fullres__tiny__supervised__seed-0",))
    assert result.plan.combine == "single"
    assert "the only candidate of its kind" in result.plan.why
    with pytest.raises(InvalidInput, match="fold 3 is unfinished"):
        found(made, runs=("3d_fullres__tiny__uamt__seed-0",))
    with pytest.raises(InvalidInput, match="no run nothing in split default"):
        found(made, runs=("nothing",))


def test_a_method_without_a_finished_run_is_refused_before_anything_is_written(
    made: Workspace, split_folder: Path
) -> None:
    with pytest.raises(InvalidInput, match="no run of uamt with all folds finished; there are mean_t"):
        found(made, wish=Wish(methods=("uamt",)))
    only = {"runs": ("3d_fullres__tiny__mean_teacher__seed-0",), "verdict": Judged("hurt")}
    with pytest.raises(InvalidInput, match="train supervised on all folds, or name a method"):
        found(made, **only)
    assert not list(split_folder.glob("*.json"))


def test_folds_with_different_labels_make_no_final_model(made: Workspace) -> None:
    with pytest.raises(InvalidInput, match="benchmark-8_draw-0 were trained with different labels"):
        found(made, split="benchmark-8_draw-0")


def test_missing_probabilities_are_predicted_unless_no_ensemble_is_wanted(
    made: Workspace, split_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def without_probabilities(*given: Any) -> list[OutOfFoldCase]:
        cases = collect(*given)
        return cases if asked else [replace(case, probabilities=None) for case in cases]

    collect = selection.collect
    monkeypatch.setattr(selection, "collect", without_probabilities)
    monkeypatch.setattr(selection, "predict_out_of_fold", lambda run, *_: asked.append(run.spec.method))
    found(made, wish=Wish(ensemble=False))
    assert asked == []
    assert len(found(made).scored.ensembles) == 1
    assert asked == ["mean_teacher", "supervised"]


def test_the_command_prints_the_ranking_and_the_reason(
    made: Workspace, split_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([DATASET, "--workspace", str(made.root), "-np", "1", "-q", "-m", "mean_teacher"]) == 0
    printed = capsys.readouterr().out
    assert "pooled out-of-fold Dice, 10 cases" in printed
    assert "The user asked for mean_teacher." in printed
    assert f"run: {DATASET}/default/3d_fullres__tiny__mean_teacher__seed-0, fold 0, 1, 2, 3, 4" in printed
    assert str(split_folder / "inference_plan.json") in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", SelectionOptions(n_workers=None)),
        ("--labeled all --ensemble", SelectionOptions("default", wish=Wish(ensemble=True), n_workers=None)),
        (
            "--labeled 20 --draw 2 -m a b --no_ensemble --runs r s -np 3 --device cpu",
            SelectionOptions(
                "deployment-20_draw-2", ("r", "s"), Wish(("a", "b"), False), None, device="cpu", n_workers=3
            ),
        ),
    ],
)
def test_every_option_arrives(words: str, expected: SelectionOptions) -> None:
    assert command._options(command._parser().parse_args(["4", *words.split()])) == expected
