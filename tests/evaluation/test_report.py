"""The report: keys and what they mean, drawings, a page of made-up runs, and the check of all its numbers."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from autossl.cli.report import main
from autossl.data.files import read_json, write_json
from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput
from autossl.data.provenance import Written
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.runs import CHECKPOINT_FINAL, RunSpec
from autossl.data.splits import load_or_make_split, split_cases
from autossl.data.workspace import Workspace
from autossl.evaluation.evaluate import EvaluationOptions, evaluate_folder
from autossl.evaluation.judge_runs import judge_runs
from autossl.evaluation.report.check import check_report
from autossl.evaluation.report.figures import box_figure, differences_figure
from autossl.evaluation.report.overlay import PicturedCase, outline, overlays
from autossl.evaluation.report.place import choose_split, short_names
from autossl.evaluation.report.report import write_report
from autossl.evaluation.report.sources import Files, Traced, pointer, quantile, shown
from autossl.evaluation.report.svg import round_ticks
from autossl.evaluation.selection.choose import Wish
from autossl.evaluation.selection.selection import SelectionOptions, find_best_configuration
from autossl.inference.inference_plan import InferencePlan, LabelBudget, PlanMember, write_inference_plan
from autossl.planners.fingerprint import extract_fingerprint, write_fingerprint

DATASET = "Dataset001_X"
CASES = [f"case{number}" for number in range(10)]
SPLIT = "default"
HOSTILE = "<script>alert('x')</script> & \"quotes\""


# ---------------------------------------------------------------------------------------------------------------- keys


@pytest.fixture
def files(tmp_path: Path) -> Files:
    write_json(tmp_path / "a.json", {"cases": {"x": {"L/1": {"dice": 0.5}, "R": {"dice": 1.0}}}, "n": 2})
    write_json(tmp_path / "fold_0" / "s.json", {"cases": {"x": {"L": {"dice": 0.2}, "R": {"dice": None}}}})
    write_json(tmp_path / "fold_1" / "s.json", {"cases": {"y": {"L": {"dice": 0.6}, "R": {"dice": 0.9}}}})
    write_json(
        tmp_path / "p.json", {"cases": {"a": {"pool": "test", "v": [3, 1]}, "b": {"pool": "labeled", "v": [5, 2]}}}
    )
    lines = [{"step": 10, "steps_per_second": 2.0}, {"step": 40, "steps_per_second": 3.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 50, "st')
    return Files(tmp_path)


@pytest.mark.parametrize(
    ("source", "key", "value"),
    [
        ("a.json", "/n", 2),
        ("a.json", "/cases/x/L~11/dice", 0.5),
        ("a.json", "/cases/y/R/dice", None),
        ("a.json", "/cases/x", None),
        ("absent.json", "/n", None),
        ("fold_*/s.json", "mean /cases/*/L/dice", 0.4),
        ("fold_*/s.json", "mean /cases/*/R/dice", 0.9),
        ("fold_*/s.json", "mean-of-means /cases/*/*/dice", (0.4 + 0.9) / 2),
        ("fold_*/s.json", "count /cases/*", 2),
        ("p.json", "count /cases/[pool=test]", 1),
        ("p.json", "max /cases/*/v/0", 5),
        ("p.json", "median /cases/[pool=labeled]/v/*", 3.5),
        ("p.json", "distinct /cases/*/pool", 2),
        ("log.jsonl", "last /*/step", 40),
        ("log.jsonl", "hours /*", (10 / 2 + 30 / 3) / 3600),
    ],
)
def test_a_key_says_where_a_value_stands_and_what_was_made_of_several(
    files: Files, source: str, key: str, value: float | None
) -> None:
    assert files.value(source, key) == (None if value is None else pytest.approx(value))


def test_names_with_signs_of_their_own_are_taken_as_they_are(files: Files, tmp_path: Path) -> None:
    name = "~a/*[b=c]"
    write_json(tmp_path / "n.json", {"classes": {name: 7, "other": 8}})
    assert files.value("n.json", pointer("classes", name)) == 7
    assert files.get("n.json", "classes", name) == 7


def test_several_values_without_a_word_and_unknown_words_are_faults(files: Files) -> None:
    with pytest.raises(InvalidInput, match="2 values at /cases/"):
        files.value("p.json", "/cases/*/pool")
    with pytest.raises(InvalidInput, match="one of mean, median"):
        files.value("p.json", "mode /cases/*/pool")


def test_values_are_shown_with_signs_and_units() -> None:
    assert shown(-0.01234, "points") == "−1.23"
    assert shown(0.8765, "dice") == "0.876"
    assert shown(0.0004, "p") == "< 0.001"
    assert shown(1234, "count") == "1,234"
    assert shown(None, "dice") == "–"
    assert np.isnan(Traced(None, "", "").number)


# ------------------------------------------------------------------------------------------------------------ drawings


def test_quartiles_and_ticks_are_the_usual_ones() -> None:
    values = [0.3, 1.0, 0.7, 0.2, 0.9]
    assert [quantile(values, q) for q in (0.25, 0.5, 0.75)] == pytest.approx(np.quantile(values, (0.25, 0.5, 0.75)))
    assert round_ticks(0.12, 0.97) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert round_ticks(-3.1, 2) == pytest.approx([-2, 0, 2])


def test_the_outline_of_a_mask_follows_its_pixels() -> None:
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 2:4] = True
    assert sorted(re.findall(r"M\d+ \d+[HV]\d+", outline(mask))) == ["M2 1H4", "M2 1V3", "M2 3H4", "M4 1V3"]
    assert outline(np.zeros((3, 3), dtype=bool)) == ""


def test_pictures_show_the_slice_with_most_foreground_and_the_one_that_differs_most() -> None:
    reference = np.zeros((5, 50, 50), dtype=np.uint8)
    reference[1, 10:30, 10:30] = 1
    prediction = reference.copy()
    prediction[3, 12:20, 12:20] = 1
    schema = LabelSchema({"background": (0,), "organ": (1,)})
    case = PicturedCase(np.random.default_rng(0).normal(size=(5, 50, 50)), reference, prediction, (3.0, 2.0, 1.0), True)
    drawn = overlays(case, schema)
    assert [(picture.z, picture.what) for picture in drawn] == [(1, "most foreground"), (3, "largest difference")]
    assert "scale(1 2.00000)" in drawn[0].drawing
    assert 'class="reference ink" d="M' in drawn[0].drawing
    assert 'class="reference ink" d=""' in drawn[1].drawing


def test_drawings_escape_what_they_are_told_and_take_one_value() -> None:
    for drawing in (box_figure({HOSTILE: [0.5]}, "Dice", HOSTILE), differences_figure({HOSTILE: 0.0}, "x", "y")):
        assert "<script" not in drawing
        assert "nan" not in drawing


def test_short_names_keep_what_differs() -> None:
    folders = ["2d__nano__a__seed-0", "2d__nano__b__seed-0", "3d__nano__b__long__seed-0"]
    assert list(short_names(folders).values()) == ["2d a", "2d b", "3d b long"]
    assert list(short_names(["2d__nano__a__seed-0", "2d__nano__a__seed-1"]).values()) == ["a seed 0", "a seed 1"]


# ------------------------------------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Ten tiny cases, two runs with five folds of made-up predictions, and all result files that this takes."""
    workspace = Workspace(tmp_path_factory.mktemp("made"))
    raw_folder, preprocessed = workspace.raw / DATASET, workspace.preprocessed / DATASET
    rng = np.random.default_rng(0)
    truth = {}
    for number, case in enumerate(CASES):
        truth[case] = np.zeros((6, 12, 12), dtype=np.uint8)
        truth[case][1:5, 2:10, 2 : 6 + number % 3] = 1
        write_volume(raw_folder / "imagesTr" / f"{case}_0000.nii.gz", (rng.normal(size=(6, 12, 12)) + truth[case]) * 10)
        write_volume(raw_folder / "labelsTr" / f"{case}.nii.gz", truth[case])
    write_volume(raw_folder / "imagesTr" / "forgotten_0000.nii.gz", rng.normal(size=(6, 12, 12)))
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "numTraining": 10}
    write_json(raw_folder / "dataset.json", {**description, "file_ending": ".nii.gz"})
    raw = read_raw_dataset(raw_folder)
    write_fingerprint(preprocessed / "fingerprint.json", extract_fingerprint(raw, n_workers=1))
    split = load_or_make_split(preprocessed, split_cases(raw))
    folds = {str(number): fold for number, fold in enumerate(split.folds)}
    for method, shift in (("supervised", 1), ("mean_teacher", 0)):
        folder = workspace.results / DATASET / SPLIT / f"2d__nano__{method}__seed-0"
        spec = RunSpec(
            dataset=DATASET,
            split=SPLIT,
            configuration="2d",
            preset="nano",
            method=method,
            seed=0,
            plans_hash="abc123",
            total_steps=100,
            folds=folds,
            versions={"autossl": "9.9"},
        )
        write_json(folder / "run.json", spec.model_dump(mode="json"))
        for key, fold in folds.items():
            validation = folder / f"fold_{key}" / "validation"
            for case in fold.validation:
                write_volume(validation / f"{case}.nii.gz", np.roll(truth[case], shift + int(case[-1]) % 2, axis=1))
            options = EvaluationOptions(cases=fold.validation)
            evaluate_folder(validation, raw_folder / "labelsTr", SCHEMA, options, output=validation / "summary.json")
            (folder / f"fold_{key}" / CHECKPOINT_FINAL).write_bytes(b"")
            line = {"step": 100, "losses": {"supervised": 0.5}, "steps_per_second": 2.0, "memory_mb": 300.0}
            (folder / f"fold_{key}" / "log.jsonl").write_text(json.dumps(line) + "\n")
    judge_runs(workspace, DATASET, SPLIT, n_resamples=200)
    results = workspace.results / DATASET / SPLIT
    member = PlanMember(run=f"{DATASET}/{SPLIT}/2d__nano__mean_teacher__seed-0", folds=tuple(folds))
    plan = InferencePlan(
        dataset=DATASET,
        split=SPLIT,
        members=(member,),
        combine="single",
        why="it reached 90 of 100",
        labels=LabelBudget(n_cases=10, n_patients=10),
        dice=0.9,
        written=Written.now(),
    )
    write_inference_plan(results / "inference_plan.json", plan)
    ranked = {"case": "forgotten", "rank": 1, "score": 0.75, "terms": {"shift": 0.5}, "reasons": [HOSTILE]}
    write_json(results / "label_next.json", {"n_candidates": 1, "next": [ranked], "left_out": {"z": "a copy"}})
    write_report(workspace, DATASET)
    return workspace


SCHEMA = LabelSchema({"background": (0,), "organ": (1,)})


def write_volume(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8 if array.dtype == np.uint8 else np.float32))
    image.SetSpacing((1.0, 1.0, 2.0))
    sitk.WriteImage(image, str(path))


@pytest.fixture
def workspace(made: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(made.root, tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")


def page_of(workspace: Workspace) -> Path:
    return workspace.results / DATASET / SPLIT / "report.html"


class Untraced(HTMLParser):
    """Text outside of what says where it comes from, of names and code, and of drawings."""

    quiet = ("svg", "style", "script", "code", "time")
    void = ("meta", "link", "br", "img")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[bool] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        names = (given.get("class") or "").split()
        if tag not in self.void:
            self.stack.append(tag in self.quiet or "data-source" in given or "name" in names)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        if not any(self.stack) and data.strip():
            self.texts.append(data.strip())


def test_every_number_of_the_page_says_where_it_comes_from(made: Workspace) -> None:
    reader = Untraced()
    page = page_of(made).read_text(encoding="utf-8")
    reader.feed("<body" + page.split("<body", 1)[1].split("</body>")[0])
    numbers = [text for text in reader.texts if re.search(r"\d", re.sub(r"HD95", "", text))]
    assert numbers == []
    assert len(reader.texts) > 50


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(made: Workspace) -> None:
    page = page_of(made).read_text(encoding="utf-8")
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert" in page
    assert set(re.findall(r"https?://[^\"' )]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "default-src 'none'" in page


def test_the_page_tells_the_verdict_the_forgotten_label_and_what_is_not_there(made: Workspace) -> None:
    page = page_of(made).read_text(encoding="utf-8")
    word = read_json(made.results / DATASET / SPLIT / "verdict.json")["word"]
    assert f'data-key="/word" data-form="text">{word}<' in page
    assert '<span class="name">forgotten</span>: ' in page
    assert "autossl_find_postprocessing -d" in page  # not there yet
    assert 3 <= page.count('class="overlay"') <= 6
    assert 'data-figure="per case"' in page


def test_a_page_that_agrees_is_found_to_agree(made: Workspace) -> None:
    found = check_report(made, DATASET)
    assert found.differences == ()
    assert found.verdict
    assert found.n_values > 150
    assert found.n_figures >= 4
    assert found.n_scores == 2 * len(CASES) * 12
    assert main([DATASET, "--workspace", str(made.root), "--check", "-q"]) == 0


def test_a_changed_page_is_found(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(workspace)
    text = page.read_text(encoding="utf-8")
    found = re.search(r'(data-key="/estimate" data-form="points" data-value="[^"]+">)([^<]+)<', text)
    assert found is not None
    changed = text.replace(found[0], f"{found[1]}+99.99<", 1).replace('<circle cx="', '<circle cx="1', 1)
    page.write_text(changed, encoding="utf-8")
    with_faults = check_report(workspace, DATASET).differences
    assert any("+99.99" in problem.found and "/estimate" in problem.found for problem in with_faults)
    assert any("the figure 'verdict'" in problem.found for problem in with_faults)
    assert len(with_faults) == 2
    assert main([DATASET, "--workspace", str(workspace.root), "--check", "-q"]) == 2
    assert "+99.99" in capsys.readouterr().err


def test_changed_scores_are_found_on_the_page_and_against_the_label_maps(workspace: Workspace) -> None:
    path = next((workspace.results / DATASET / SPLIT).glob("*supervised*/fold_0/validation/summary.json"))
    summary = read_json(path)
    case = next(iter(summary["cases"]))
    summary["cases"][case]["organ"]["dice"] = 0.123
    write_json(path, summary)
    texts = [str(problem) for problem in check_report(workspace, DATASET).differences]
    assert any("mean /cases/*/organ/dice" in text for text in texts)
    assert any(f"case {case}" in text and "organ dice is 0.123 in the file" in text for text in texts)
    assert any("verdict.json" in text and "the scores give" in text for text in texts)


def test_a_changed_verdict_is_found_against_the_scores(workspace: Workspace) -> None:
    path = workspace.results / DATASET / SPLIT / "verdict.json"
    verdict = read_json(path)
    verdict["per_class"]["organ"]["high"] += 0.01
    write_json(path, verdict)
    write_report(workspace, DATASET)
    (problem,) = check_report(workspace, DATASET).differences
    assert "/per_class/organ/high" in problem.found
    assert problem.file == path


def test_a_changed_selection_is_found_against_the_scores(workspace: Workspace) -> None:
    wish = Wish(ensemble=False)  # no probabilities were saved
    path = find_best_configuration(workspace, DATASET, SelectionOptions(wish=wish)).path.with_name("selection.json")
    write_report(workspace, DATASET)
    found = check_report(workspace, DATASET)
    assert (found.differences, found.n_candidates) == ((), 2)
    selection = read_json(path)
    selection["candidates"][1]["dice"]["low"] -= 0.01
    write_json(path, selection)
    write_report(workspace, DATASET)
    (problem,) = check_report(workspace, DATASET).differences
    assert f"/candidates/{selection['candidates'][1]['name']}/dice/low" in problem.found
    assert problem.file == path


def test_files_that_came_later_are_missed_by_an_old_page(workspace: Workspace) -> None:
    later = {"rules": [], "found_on": {"n_cases": 10, "n_patients": 10}, "why": []}
    write_json(workspace.results / DATASET / SPLIT / "postprocessing.json", later)
    texts = [problem.found for problem in check_report(workspace, DATASET).differences]
    assert any("does not show" in text and "postprocessing.json, /found_on/n_cases" in text for text in texts)


def test_without_results_the_page_shows_the_data_and_names_the_commands(workspace: Workspace) -> None:
    shutil.rmtree(workspace.results)
    page = write_report(workspace, DATASET).read_text(encoding="utf-8")
    assert page.count("Not there yet") >= 7
    assert "count /cases/[pool=labeled]" in page
    assert check_report(workspace, DATASET).differences == ()


def test_the_page_can_be_made_without_the_raw_data(workspace: Workspace) -> None:
    shutil.rmtree(workspace.raw)
    page = write_report(workspace, DATASET).read_text(encoding="utf-8")
    assert "No pictures" in page


def test_several_splits_are_listed_and_a_wrong_one_is_refused(workspace: Workspace) -> None:
    results = workspace.results / DATASET
    shutil.copytree(results / SPLIT, results / "benchmark-8_draw-0")
    assert choose_split(workspace, DATASET) == SPLIT
    shutil.copytree(results / SPLIT, results / "deployment-8_draw-0")
    with pytest.raises(InvalidInput, match="deployment-8_draw-0"):
        choose_split(workspace, DATASET)
    with pytest.raises(InvalidInput, match="no split 'defalt'"):
        choose_split(workspace, DATASET, "defalt")


def test_checking_without_a_page_is_refused(workspace: Workspace) -> None:
    page_of(workspace).unlink()
    with pytest.raises(InvalidInput, match="there is no report"):
        check_report(workspace, DATASET)
