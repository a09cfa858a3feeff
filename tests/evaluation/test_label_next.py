"""The ranking of unlabeled cases: closed-form disagreement, and what each term does to the order."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autossl.data.labels import LabelSchema
from autossl.evaluation.label_next import (
    CaseEvidence,
    LabeledPool,
    class_disagreement,
    disagreement,
    majority_vote,
    rank_cases,
)

SCHEMA = LabelSchema({"background": (0,), "organ": (1,), "tumor": (2,)})
REGIONS = LabelSchema({"background": (0,), "whole": (1, 2), "core": (2,)}, (1, 2))


def line(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint8).reshape(1, 1, -1)


def case(name: str, **changes: Any) -> CaseEvidence:
    base = CaseEvidence(name, name, 0.2, None, {"organ": 100.0}, {"size": (1.0, 1.0), "level": (5.0,)})
    return replace(base, **changes)


def pool(**changes: Any) -> LabeledPool:
    features = tuple({"size": (1.0 + 0.1 * n, 1.0), "level": (5.0,)} for n in range(3))
    base = LabeledPool(("x", "y", "z"), frozenset("xyz"), features, {"organ": 100.0})
    return replace(base, **changes)


def order(*cases: CaseEvidence, n: int = 1, **options: Any) -> list[str]:
    return [ranked.case for ranked in rank_cases(cases, options.pop("labeled", pool()), n, **options)]


def test_disagreement_is_one_minus_dice_over_pairs_and_classes() -> None:
    maps = [line(0, 1, 1, 2), line(0, 0, 1, 2), line(0, 1, 1, 0)]
    found = class_disagreement(maps, SCHEMA)
    organ = [1 - 2 * 1 / 3, 1 - 2 * 2 / 4, 1 - 2 * 1 / 3]
    tumor = [1 - 2 * 1 / 2, 1.0, 1.0]
    assert found == pytest.approx({"organ": np.mean(organ), "tumor": np.mean(tumor)})
    assert disagreement(maps, SCHEMA) == pytest.approx(np.mean([*organ, *tumor]))


def test_classes_that_nobody_shows_do_not_count() -> None:
    maps = [line(0, 1, 0), line(0, 1, 1)]
    assert math.isnan(class_disagreement(maps, SCHEMA)["tumor"])
    assert disagreement(maps, SCHEMA) == pytest.approx(1 / 3)
    assert disagreement([line(0, 0), line(0, 0)], SCHEMA) is None


def test_regions_are_unions_of_their_values() -> None:
    found = class_disagreement([line(1, 2, 0), line(2, 2, 0)], REGIONS)
    assert found == pytest.approx({"whole": 0.0, "core": 1 / 3})


def test_large_maps_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    maps = [generator.integers(0, 3, (4, 5, 6)).astype(np.uint8) for _ in range(4)]
    whole = class_disagreement(maps, SCHEMA)
    monkeypatch.setattr("autossl.evaluation.label_next.VOXELS_AT_ONCE", 7)
    assert class_disagreement(maps, SCHEMA) == pytest.approx(whole)


def test_one_map_or_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="1 label maps"):
        class_disagreement([line(0)], SCHEMA)
    with pytest.raises(ValueError, match="2 label maps of shapes"):
        class_disagreement([line(0), line(0, 1)], SCHEMA)


def test_the_vote_takes_the_most_frequent_and_then_the_smallest_value() -> None:
    assert majority_vote([line(0, 1, 2, 1), line(0, 1, 1, 2), line(2, 2, 0, 2)]).ravel().tolist() == [0, 1, 0, 2]


def test_more_disagreement_comes_first() -> None:
    cases = [case("a", fold_disagreement=0.1), case("b", fold_disagreement=0.3), case("c", fold_disagreement=0.2)]
    assert order(*cases) == ["b", "c", "a"]
    by_runs = [case("a", run_disagreement=0.9), case("b", fold_disagreement=0.3)]
    assert order(*by_runs) == ["a", "b"], "the mean of both counts: (0.2 + 0.9) / 2 > 0.3"
    assert order(case("a", fold_disagreement=None), case("b", fold_disagreement=0.01)) == ["b", "a"]


def test_foreground_counts_up_to_the_labeled_median() -> None:
    cases = [
        case("a", volumes={"organ": 50.0}),
        case("b", volumes={"organ": 100.0}),
        case("c", volumes={"organ": 900.0}),
    ]
    ranked = {found.case: found for found in rank_cases(cases, pool(), 3)}
    assert {name: found.terms["volume"] for name, found in ranked.items()} == {"a": 0.5, "b": 1.0, "c": 1.0}
    unknown = rank_cases(cases, pool(median_volumes={"organ": None}), 3)
    assert {found.case: found.terms["volume"] for found in unknown} == {"a": 0.5, "b": 1.0, "c": 1.0}, "of candidates"


def test_shift_is_the_distance_in_units_of_the_labeled_pool() -> None:
    level = {"level": (5.0,)}
    cases = [case(f"a{n}", features={"size": (1.0 + 0.01 * n, 1.0), **level}) for n in range(4)]
    far = case("far", features={"size": (1.4, 1.0), **level})
    ranked = {found.case: found for found in rank_cases([*cases, far], pool(), 1)}
    ratio = (1.4 - 1.2) / 0.1
    assert ranked["far"].measured["shift_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert ranked["far"].terms["shift"] == pytest.approx(1 - 1 / ratio, abs=1e-3)
    assert ranked["far"].measured["differs_most_in"] == "size"
    assert ranked["a0"].terms["shift"] == 0


def placed(name: str, size: float, **changes: Any) -> CaseEvidence:
    """A candidate at a place on a line, far from everything that is labeled."""
    return case(name, features={"size": (size, 1.0), "level": (5.0,)}, **changes)


def far_pool() -> LabeledPool:
    return pool(features=tuple({"size": (-30.0 - n, 1.0), "level": (5.0,)} for n in range(3)))


def test_the_gain_is_what_a_case_tells_about_the_needs_of_the_pool() -> None:
    """One feature that varies, nothing labeled: the formula of the module, by hand."""
    sizes, losses = (1.0, 2.0, 4.0), (0.1, 0.3, 0.2)
    cases = [placed(name, size, fold_disagreement=loss) for name, size, loss in zip("abc", sizes, losses, strict=True)]
    need = np.array([(place / 6 + 1.0) / 2 for place in (1, 5, 3)])  # mid-ranks 1/6, 5/6, 3/6; all of full volume
    distance = np.abs(np.subtract.outer(sizes, sizes))  # h is the median of 1, 2 and 3, in any unit
    alike = np.exp(-((distance / 2) ** 2))
    gains = alike @ need / need.sum()
    ranked = rank_cases(cases, pool(cases=(), patients=frozenset(), features=()), 2)
    assert [found.case for found in ranked] == ["b", "c", "a"]
    assert ranked[0].score == pytest.approx(gains[1], abs=1e-4)
    second = np.maximum(alike - alike[1], 0) @ need / need.sum()
    assert ranked[1].score == pytest.approx(second[2], abs=1e-4)
    assert ranked[1].terms["closeness"] == pytest.approx(alike[1, 2], abs=1e-4)
    covered = np.maximum(alike[1], alike[2])
    assert ranked[2].score == pytest.approx((np.maximum(alike[0] - covered, 0) @ need) / need.sum(), abs=1e-4)
    assert [found.measured["represents"] for found in ranked] == [3, 1, 1]


def test_a_typical_case_comes_before_an_odd_one_that_is_disputed_more() -> None:
    crowd = [placed(f"a{n}", 1.0 + 0.01 * n, fold_disagreement=0.3) for n in range(6)]
    odd = placed("odd", 9.0, fold_disagreement=0.9)
    ranked = rank_cases([*crowd, odd], far_pool(), 2)
    assert ranked[0].case.startswith("a")
    assert ranked[1].case == "odd", "the crowd needs one case, and has it"
    assert ranked[0].measured["represents"] == 6
    assert ranked[0].reasons[0].startswith("stands for 6 candidates")


def test_of_cases_that_resemble_each_other_one_is_enough() -> None:
    cases = [
        placed("a", 1.0, fold_disagreement=0.9),
        placed("b", 1.0, fold_disagreement=0.8),
        placed("c", 3.0, fold_disagreement=0.1),
    ]
    assert order(*cases, n=2, labeled=far_pool()) == ["a", "c", "b"]
    near_c = pool(features=({"size": (3.0, 1.0), "level": (5.0,)},) * 3)
    assert order(*cases, n=2, labeled=near_c)[:2] == ["a", "b"], "c is known, b is worth as little and needs more"


def test_scans_of_one_patient_and_duplicates_count_as_the_same_case() -> None:
    cases = [placed(name, size, fold_disagreement=0.5) for name, size in (("a", 1.0), ("b", 2.0), ("c", 5.0))]
    twins = {frozenset(("b", "c"))}
    apart = rank_cases(cases, far_pool(), 3)
    assert [found.case for found in apart][:2] == ["b", "c"]
    assert [found.case for found in rank_cases(cases, far_pool(), 3, alike=twins)] == ["b", "a", "c"]
    same = [cases[0], cases[1], replace(cases[2], patient="b")]
    last = rank_cases(same, far_pool(), 3)[-1]
    assert (last.case, last.score, last.terms["closeness"]) == ("c", 0.0, 1.0)
    known = rank_cases([replace(cases[1], patient="x"), *cases[::2]], far_pool(), 3)
    assert (known[-1].case, known[-1].score) == ("b", 0.0), "a labeled patient's scan comes last"


def test_each_case_says_why_with_its_figures() -> None:
    little = {"organ": 40.0}
    cases = [case("a", fold_disagreement=0.6, volumes=little), case("b", volumes=little), case("c", volumes=little)]
    first, second, _ = rank_cases(cases, far_pool(), 2)
    assert (first.case, first.rank) == ("a", 1)
    assert first.reasons[0] == "stands for 3 candidates: nearer to them than anything labeled or higher on the list"
    assert "folds agree to a Dice of 0.40 (median of all candidates 0.80)" in first.reasons
    assert second.reasons[-1] == "although it resembles one that is labeled or higher on the list"
    (volume,) = rank_cases([case("b")], far_pool(), 1)
    assert "much to outline: organ 1.0 × the labeled median" in volume.reasons


def test_nothing_is_ranked_twice_and_equal_cases_come_by_name() -> None:
    cases = [case(name) for name in "dacb"]
    ranked = rank_cases(cases, pool(features=(), cases=(), patients=frozenset()), 10)
    assert [found.case for found in ranked] == list("abcd")
    assert [found.rank for found in ranked] == [1, 2, 3, 4]
    assert rank_cases([], pool(), 3) == []
    chosen = rank_cases(cases, pool(), 2)
    assert [found.rank for found in chosen] == [1, 2, None, None]
