"""Finding rules on made-up predictions: planted faults are found, harm and noise are not taken for a gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput
from autossl.evaluation.postprocessing import (
    HeldCase,
    PostprocessingPlan,
    Rule,
    SearchOptions,
    apply_rules,
    find_rules,
    judge_rule,
)
from autossl.inference.postprocess import LabelMap
from autossl.inference.postprocessing_plan import read_postprocessing, write_postprocessing

SCHEMA = LabelSchema({"background": (0,), "organ": (1,), "tumor": (2,)})
MILLIMETER = (1.0, 1.0, 1.0)
N = 12
FEW = SearchOptions(n_resamples=500)


def reference() -> LabelMap:
    """An organ of 6 by 6 by 6 voxels and, apart from it, a tumor in two parts of 27 and 8."""
    labels = np.zeros((14, 16, 18), dtype=np.uint8)
    labels[2:8, 2:8, 2:8] = 1
    labels[2:5, 11:14, 2:5] = 2
    labels[2:4, 11:13, 9:11] = 2
    return labels


def found(
    fault: Callable[[int, LabelMap], None], n: int = N, patients: Sequence[str] | None = None
) -> PostprocessingPlan:
    """Rules for predictions that equal the reference but for a fault, planted by case number."""
    cases = []
    for number in range(n):
        prediction = reference()
        fault(number, prediction)
        cases.append((prediction, reference(), MILLIMETER))
    return find_rules(cases, patients or [f"p{number}" for number in range(n)], SCHEMA, FEW)


def trial_of(plan: PostprocessingPlan, text: str) -> str:
    return next(trial.because for trial in plan.why if str(trial.rule) == text)


def islands(_: int, prediction: LabelMap) -> None:
    prediction[11, 13, 14:17] = 1


def test_islands_of_a_class_lead_to_its_largest_component() -> None:
    plan = found(islands)
    assert plan.rules == (Rule(kind="keep_largest", class_name="organ"),)
    kept = next(trial for trial in plan.why if trial.kept)
    gain = 1 - 2 * 216 / (216 + 219)  # of one of two classes, the same in every case
    assert kept.class_gains == pytest.approx({"organ": gain, "tumor": 0.0})
    assert (kept.gain, kept.low, kept.high) == pytest.approx((gain / 2,) * 3)
    assert kept.n_cases_changed == N
    assert kept.because == f"mean Dice {50 * gain:+.2f} ({50 * gain:+.2f} to {50 * gain:+.2f}), 12 of 12 cases"


def test_what_would_cut_off_a_true_part_is_not_kept() -> None:
    """All foreground in one component would lose the tumor, the tumor's largest component its smaller part."""
    plan = found(islands)
    assert "no gain" in trial_of(plan, "keep the largest component of all foreground")
    assert "no gain" in trial_of(plan, "keep the largest component of tumor")


def test_specks_beside_true_parts_lead_to_the_smallest_size_that_gains_most() -> None:
    def speck(number: int, prediction: LabelMap) -> None:
        prediction[11, 13, 14 : 17 if number % 2 else 15] = 2

    plan = found(speck)
    assert plan.rules == (Rule(kind="min_size_mm3", class_name="tumor", value=3.5),)  # 10 % of 35 mm³
    tried = {trial.rule.value: trial for trial in plan.why if trial.rule.class_name == "tumor" and trial.rule.value}
    assert sorted(tried) == [0.035, 0.1, 0.35, 1.1, 3.5]
    assert [value for value, trial in tried.items() if trial.kept] == [3.5]
    assert "passes, but" in tried[1.1].because


def test_holes_lead_to_filling() -> None:
    def hole(_: int, prediction: LabelMap) -> None:
        prediction[4:6, 4:6, 4:6] = 0

    assert found(hole).rules == (Rule(kind="fill_holes", class_name="organ"),)


def test_rules_are_tried_on_what_those_before_have_left() -> None:
    def both(number: int, prediction: LabelMap) -> None:
        islands(number, prediction)
        prediction[4, 4, 4] = 0

    plan = found(both)
    assert [rule.kind for rule in plan.rules] == ["keep_largest", "fill_holes"]
    assert all(dice["organ"].after == 1 for dice in plan.cases.values())
    assert not any(trial.rule.kind == "min_size_mm3" and trial.rule.class_name == "organ" for trial in plan.why)


def test_a_false_alarm_that_goes_counts_as_a_gain() -> None:
    schema = LabelSchema({"background": (0,), "tumor": (1,)})
    cases = []
    for number in range(N):
        labels = np.zeros((12, 12, 12), dtype=np.uint8)
        if number % 2:
            labels[2:7, 2:7, 2:7] = labels[8:12, 8:12, 8:12] = 1
        prediction = labels.copy()
        if not number % 2:
            prediction[10, 10, 10] = 1
        cases.append((prediction, labels, MILLIMETER))
    plan = find_rules(cases, range(N), schema, FEW, names=[f"case{number}" for number in range(N)])
    assert [rule.kind for rule in plan.rules] == ["min_size_mm3"]
    assert plan.cases["case0"]["tumor"].model_dump() == {"before": 0.0, "after": 1.0}
    assert next(trial for trial in plan.why if trial.kept).gain == pytest.approx(0.5)


def test_few_patients_are_too_few_to_tell() -> None:
    plan = found(islands, patients=[f"p{number // 2}" for number in range(N)])
    assert plan.rules == ()
    because = trial_of(plan, "keep the largest component of organ")
    assert because == "6 patients are too few to tell noise from effect (at least 8)"
    assert plan.found_on == {"n_cases": 12, "n_patients": 6}


def judged(differences: Sequence[Sequence[float]], n: int = 20) -> tuple[bool, str]:
    """Of differences [cases, classes] that are repeated until there are n."""
    before = np.full((n, len(differences[0])), 0.5)
    after = before + np.array([differences[number % len(differences)] for number in range(n)])
    names = [f"class{number}" for number in range(len(differences[0]))]
    trial = judge_rule(Rule(kind="keep_largest_foreground"), before, after, range(n), names, FEW)
    return trial.kept, trial.because


def test_a_gain_within_noise_is_not_kept() -> None:
    kept, because = judged([[0.1], [-0.095]])
    assert not kept
    assert because.endswith("within noise")


def test_a_gain_in_few_cases_and_a_loss_in_none_is_kept() -> None:
    assert judged([[0.3], *[[0.0]] * 19])[0]
    assert not judged([[-0.3], *[[0.0]] * 19])[0]


def test_a_class_that_only_loses_forbids_the_rule() -> None:
    kept, because = judged([[0.2, -0.01], [0.2, -0.02]])
    assert not kept
    assert "lowered beyond noise: class1 -1.50 (" in because
    assert judged([[0.2, -0.02], [0.2, 0.019]])[0], "a loss within noise does not"


def test_what_changes_nothing_says_so() -> None:
    assert judged([[0.0]]) == (False, "changes the Dice of no case")
    assert found(lambda *_: None).rules == ()


def test_holding_a_case_changes_no_result() -> None:
    """Cutting to the foreground opens no hole, makes no image of one slice of a volume, and changes no size."""
    random = np.random.default_rng(0)
    rules = [
        Rule(kind="fill_holes"),
        Rule(kind="min_size_mm3", value=6.0),
        Rule(kind="keep_largest", class_name="tumor"),
        Rule(kind="keep_largest_foreground"),
    ]
    for shape in ((9, 9, 9), (1, 14, 14), (2, 14, 14), (6, 1, 20)):
        label_map = np.where(random.random(shape) < 0.6, random.integers(1, 3, shape), 0).astype(np.uint8)
        label_map[:1] = 0 if shape[0] > 1 else label_map[:1]
        flat = np.zeros((9, 9, 9), dtype=np.uint8)
        flat[4, 1:8, 1:8] = 1
        flat[4, 4, 4] = 0
        for full in (label_map, flat, np.zeros_like(flat)):
            held = HeldCase.of(full, full, (0.5, 1.0, 2.0))
            for count in range(1, len(rules) + 1):
                whole = apply_rules(full, rules[:count], SCHEMA, (0.5, 1.0, 2.0))
                assert np.array_equal(_nonzero(held.after(rules[:count], SCHEMA).label_map), _nonzero(whole))


def _nonzero(label_map: LabelMap) -> LabelMap:
    """The values of foreground voxels in scan order: the same whatever background was cut off."""
    return label_map[label_map > 0]


def test_several_processes_find_the_same() -> None:
    cases = [(np.roll(reference(), number, 2), reference(), MILLIMETER) for number in range(4)]
    one, two = (
        find_rules(cases, range(4), SCHEMA, SearchOptions(n_resamples=100, min_patients=2, n_workers=n)) for n in (1, 2)
    )
    assert one.model_copy(update={"written": None}) == two.model_copy(update={"written": None})


def test_progress_is_told_and_mismatches_are_refused() -> None:
    seen: list[tuple[int, int]] = []
    case = (reference(), reference(), MILLIMETER)
    find_rules([case], ["p"], SCHEMA, FEW, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (7, 7)
    with pytest.raises(ValueError, match="2 patients"):
        find_rules([case], ["p", "q"], SCHEMA)
    with pytest.raises(ValueError, match="shape"):
        HeldCase.of(reference(), reference()[:3], MILLIMETER)


def test_the_file_gives_back_what_was_found(tmp_path: Path) -> None:
    plan = found(islands, n=8)
    write_postprocessing(tmp_path / "postprocessing.json", plan)
    read = read_postprocessing(tmp_path / "postprocessing.json")
    assert read == plan
    assert read.label_schema == SCHEMA
    assert read.written is not None


def test_faults_of_a_file_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "postprocessing.json"
    path.write_text('{"rules": [{"kind": "erode"}, {"kind": "min_size_mm3"}]}')
    with pytest.raises(InvalidInput, match=r"rules\.0\.kind(?s:.*)rules\.1: min_size_mm3 needs a value"):
        read_postprocessing(path)
    path.write_text('{"rules": [{"kind": "keep_largest"}]}')
    assert read_postprocessing(path).label_schema is None
