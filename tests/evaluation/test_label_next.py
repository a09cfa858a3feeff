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
    Weights,
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
    assert next(iter(ranked)) == "far"


def test_of_cases_that_resemble_each_other_one_is_enough() -> None:
    here, there = {"size": (1.0, 1.0), "level": (5.0,)}, {"size": (1.2, 1.0), "level": (5.0,)}
    cases = [
        case("a", fold_disagreement=0.9, features=here),
        case("b", fold_disagreement=0.8, features=here),
        case("c", fold_disagreement=0.7, features=there),
    ]
    assert order(*cases, n=2) == ["a", "c", "b"]
    assert order(*cases, n=2, weights=Weights(closeness=0)) == ["a", "b", "c"]
    assert order(*cases, n=1) == ["a", "c", "b"]


def test_scans_of_one_patient_and_duplicates_count_as_close() -> None:
    apart = [{"size": (size, 1.0), "level": (5.0,)} for size in (1.0, 1.1, 1.2)]
    cases = [case(name, fold_disagreement=0.9 - 0.1 * n, features=apart[n]) for n, name in enumerate("abc")]
    assert order(*cases, n=2)[0] == "a"
    same = [cases[0], cases[1], replace(cases[2], patient="a")]
    assert {found.case: found.terms["closeness"] for found in rank_cases(same, pool(), 1)}["c"] == 1
    twins = {frozenset(("a", "b"))}
    assert {found.case: found.terms["closeness"] for found in rank_cases(cases, pool(), 1, alike=twins)}["b"] == 1
    known = rank_cases([replace(cases[0], patient="x"), cases[1]], pool(), 1)
    assert known[0].case == "b", "a labeled patient's scan comes later"


def test_each_case_says_why_with_its_figures() -> None:
    cases = [case("a", fold_disagreement=0.6, volumes={"organ": 30.0}), case("b"), case("c")]
    first = rank_cases(cases, pool(), 1)[0]
    assert (first.case, first.rank) == ("a", 1)
    assert first.reasons == ("folds agree to a Dice of 0.40 (median of all candidates 0.80)",)
    volume = rank_cases(cases[1:], pool(), 1)[0]
    assert "much to outline: organ 1.0 × the labeled median" in volume.reasons


def test_nothing_is_ranked_twice_and_equal_cases_come_by_name() -> None:
    cases = [case(name) for name in "dacb"]
    ranked = rank_cases(cases, pool(features=(), cases=(), patients=frozenset()), 10)
    assert [found.case for found in ranked] == list("abcd")
    assert [found.rank for found in ranked] == [1, 2, 3, 4]
    assert rank_cases([], pool(), 3) == []
    chosen = rank_cases(cases, pool(), 2)
    assert [found.rank for found in chosen] == [1, 2, None, None]
