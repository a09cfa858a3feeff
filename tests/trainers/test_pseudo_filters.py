"""Rules that choose pseudo-labels, with closed-form values; the store under rules; loaders that see accepted cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_store import TinyStore, code_image

from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput
from autossl.data.store import open_array
from autossl.trainers.base import BatchRequest, PseudoLabelRules, Refresh, StreamRequest
from autossl.trainers.batches import Streams
from autossl.trainers.components.kept_labels import judged_classes, kept_label_loss
from autossl.trainers.components.losses import SupervisedLoss
from autossl.trainers.components.pseudo_filters import (
    Decisions,
    Expected,
    class_thresholds,
    class_volumes,
    confidence_histogram,
    foreground_dice,
    kept_confidence,
    never_predicted,
    oddities,
    select_cases,
    soft_confidence,
    without_islands,
)
from autossl.trainers.patch_reader import CaseReader
from autossl.trainers.pseudo_labels import PseudoLabelStore, label_and_confidences
from autossl.trainers.pseudo_rounds import LabelKnowledge, PseudoLabelRound
from autossl.trainers.source import FoldSource
from toys import toy_architecture, toy_configuration, toy_schema

ORGANS = {"a": (1,), "b": (2,)}


def volume(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint8).reshape(1, 1, -1)


# --------------------------------------------------------------------------------------------------------- thresholds


def levels_of(probabilities: Any) -> np.ndarray:
    return np.round(np.asarray(probabilities) * 255).astype(np.uint8)


@pytest.mark.parametrize(("kept_share", "expected"), [(0.7, 70), (0.8, 80), (0.9, 90), (1.0, 100)])
def test_threshold_keeps_the_share_of_each_class(kept_share: float, expected: int) -> None:
    """100 voxels of class 1 with confidences 0.51 to 1, beside a background of another distribution."""
    confidences = np.concatenate([levels_of(np.linspace(0.51, 1, 100)), levels_of(np.full(50, 0.9))])[None, None, None]
    decisions = np.repeat([1, 0], [100, 50]).astype(np.uint8)[None, None, None]
    histogram = confidence_histogram(decisions, confidences, 3)
    assert histogram.sum(1).tolist() == [50, 100, 0]
    thresholds = class_thresholds(histogram, kept_share)
    kept = kept_confidence(decisions, confidences, thresholds)[0, 0] > 0
    assert abs(int(kept[:100].sum()) - expected) <= 1
    assert int(kept[100:].sum()) == 50, "voxels of one confidence stay together, at least the share"


def test_threshold_is_never_below_the_smallest() -> None:
    confidences = levels_of(np.linspace(0.3, 0.6, 101))[None, None, None]
    decisions = np.zeros_like(confidences)
    thresholds = class_thresholds(confidence_histogram(decisions, confidences, 1), 1.0)
    assert thresholds.tolist() == [128], "0.5 lies between the levels 127 and 128"
    kept = kept_confidence(decisions, confidences, thresholds)
    assert kept[kept > 0].min() == 128
    assert class_thresholds(np.zeros((1, 256), dtype=np.int64), 0.7).tolist() == [128], "a class without a voxel"
    assert class_thresholds(confidence_histogram(decisions, confidences, 1), 1.0, smallest=0.55).tolist() == [141]


def test_regions_have_a_threshold_on_each_side_and_all_must_be_sure() -> None:
    schema = toy_schema(regions=True)  # whole: 1 and 2, core: 2
    decisions = Decisions(schema)
    assert decisions.names == ("not whole", "whole", "not core", "core")
    of = decisions.of(volume(0, 1, 2))
    assert of[:, 0, 0].T.tolist() == [[0, 2], [1, 2], [1, 3]]
    confidences = np.array([[200, 100, 250], [250, 250, 200]], dtype=np.uint8).reshape(2, 1, 1, 3)
    thresholds = np.array([150, 150, 240, 210])
    assert kept_confidence(of, confidences, thresholds).ravel().tolist() == [200, 0, 0]


def test_soft_weight_closed_form() -> None:
    confidences = np.array([85, 170, 255], dtype=np.uint8).reshape(1, 1, 1, 3)  # 1/3, 2/3, 1
    assert soft_confidence(confidences, 3).ravel().tolist() == [0, round(0.25 * 255), 255]
    two_regions = np.array([[255, 255], [255, 64]], dtype=np.uint8).reshape(2, 1, 1, 2)
    assert soft_confidence(two_regions, 2).ravel().tolist() == [255, 0], "below chance"


def test_labels_with_gaps_have_decisions_in_output_order() -> None:
    schema = LabelSchema({"background": (0,), "high": (7,), "low": (3,)})
    assert Decisions(schema).of(volume(0, 3, 7)).ravel().tolist() == [0, 1, 2]
    assert Decisions(schema).names == ("background", "low", "high")


def test_label_and_confidences_of_softmax_and_regions() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    label, confidences = label_and_confidences(p.log().T.reshape(3, 1, 1, 2), "softmax", toy_schema())
    assert (label.ravel().tolist(), confidences.ravel().tolist()) == ([0, 2], [round(0.7 * 255), round(0.6 * 255)])
    # voxel 3 has a core without a whole: what is written as core is also whole, of which the network is not sure
    q = torch.tensor([[0.9, 0.2], [0.9, 0.8], [0.3, 0.8]])
    label, confidences = label_and_confidences(q.logit().T.reshape(2, 1, 1, 3), "sigmoid", toy_schema(regions=True))
    assert label.ravel().tolist() == [1, 2, 2]
    expected = np.array([[0.9, 0.9, 0.3], [0.8, 0.8, 0.8]])
    assert confidences.reshape(2, 3).tolist() == np.round(expected * 255).astype(int).tolist()


# ---------------------------------------------------------------------------------------------------------- stability


def test_stability_of_same_disjoint_and_empty_maps() -> None:
    one = {"a": (1,)}
    first = volume(1, 1, 0, 0)
    assert foreground_dice(first, first, one) == 1
    assert foreground_dice(first, volume(0, 0, 1, 1), one) == 0
    assert foreground_dice(volume(0, 0), volume(0, 0), one) == 1
    assert foreground_dice(first, volume(1, 0, 0, 0), one) == pytest.approx(2 / 3)
    assert foreground_dice(volume(1, 2), volume(1, 1), ORGANS) == pytest.approx((2 / 3 + 0) / 2)
    assert foreground_dice(volume(1, 2), volume(1, 1), {"whole": (1, 2), "core": (2,)}) == pytest.approx((1 + 0) / 2)


# -------------------------------------------------------------------------------------------------------- plausibility

EXPECTED = {"a": Expected(1.0, 100.0, 400.0), "b": Expected(0.5, 10.0, 20.0)}


@pytest.mark.parametrize(
    ("volumes", "found"),
    [
        ({"a": 50.0, "b": 5.0}, []),
        ({"a": 800.0, "b": 40.0}, []),
        ({"a": 49.0, "b": 0.0}, ["a has volume 49, expected 50 to 800"]),
        ({"a": 801.0, "b": 0.0}, ["a has volume 801, expected 50 to 800"]),
        ({"a": 0.0, "b": 0.0}, ["a is missing, 100% of the labeled cases show it"]),
        ({"a": 100.0, "b": 41.0}, ["b has volume 41, expected 5 to 40"]),
    ],
)
def test_missing_classes_and_odd_volumes(volumes: dict[str, float], found: list[str]) -> None:
    assert oddities(volumes, EXPECTED) == found


def test_a_class_that_no_labeled_case_shows_has_no_expected_volume() -> None:
    assert oddities({"a": 5.0}, {"a": Expected(0.0, None, None)}) == []


def test_volumes_count_voxels_of_classes_and_regions() -> None:
    label = volume(0, 1, 1, 2)
    assert class_volumes(label, ORGANS, 0.5) == {"a": 1.0, "b": 0.5}
    assert class_volumes(label, {"whole": (1, 2), "core": (2,)}, 2.0) == {"whole": 6.0, "core": 2.0}


def test_only_the_largest_component_is_kept_also_at_the_border() -> None:
    label = volume(1, 0, 1, 1, 1, 0, 2, 0, 2)
    assert without_islands(label, toy_schema(), (1,)).ravel().tolist() == [0, 0, 1, 1, 1, 0, 2, 0, 2]
    assert without_islands(label, toy_schema(), ()) is label


def test_an_island_of_a_region_becomes_the_region_around_it() -> None:
    label = volume(1, 2, 1, 2, 2, 1, 0, 1)
    schema = toy_schema(regions=True)
    assert without_islands(label, schema, (2,)).ravel().tolist() == [1, 1, 1, 2, 2, 1, 0, 1]
    assert without_islands(label, schema, (1, 2)).ravel().tolist() == [1, 1, 1, 2, 2, 1, 0, 0]


def test_never_predicted_counts_classes_that_labels_show() -> None:
    expected = {**EXPECTED, "c": Expected(0.0, None, None)}
    volumes = [{"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 0.0, "b": 0.0, "c": 0.0}]
    assert never_predicted(volumes, expected) == ["b"]


# --------------------------------------------------------------------------------------------------------------- cases


def test_the_most_stable_share_is_used_unless_odd() -> None:
    stability = {"w": 0.2, "x": 0.9, "y": 0.9, "z": 0.8, "v": 0.1}
    shown = dict.fromkeys(stability, True)
    chosen = select_cases(stability, {}, 0.5, shown)
    assert chosen.accepted == ("x", "y", "z"), "half of five is three, in the order given"
    assert chosen.reasons["w"] == ["not among the most stable 50% of the cases"]
    chosen = select_cases(stability, {"x": ["a is missing"]}, 0.5, shown)
    assert chosen.accepted == ("y", "z")
    assert chosen.reasons["x"] == ["a is missing"]
    assert select_cases(stability, {}, 1.0, shown).accepted == tuple(stability)


def test_where_all_are_rejected_the_most_stable_fifth_with_foreground_is_used() -> None:
    stability = {f"c{i}": i / 10 for i in range(10)}
    odd = {case: ["odd"] for case in stability}
    shown = {case: case != "c9" for case in stability}
    chosen = select_cases(stability, odd, 1.0, shown)
    assert chosen.fallback
    assert chosen.accepted == ("c7", "c8"), "c9 shows nothing at all"
    nothing = select_cases(stability, odd, 1.0, dict.fromkeys(stability, False))
    assert (nothing.accepted, nothing.fallback) == ((), False)
    assert select_cases({}, {}, 0.5, {}).accepted == ()


# ----------------------------------------------------------------------------------------------------------- one round


def prepared_round(folder: Path, step: int = 5, **rules: Any) -> tuple[PseudoLabelStore, PseudoLabelRound]:
    store = PseudoLabelStore(folder)
    store.begin(step, {"weights": step})
    refresh = Refresh(None, "network", "pseudo", rules=PseudoLabelRules(**{"kept_share": 0.5, **rules}))
    knowledge = LabelKnowledge(
        toy_schema(), {"class 1": Expected(1.0, 2.0, 4.0), "class 2": Expected(0.5, 1.0, 2.0)}, (1,)
    )
    return store, PseudoLabelRound(store, step, refresh, knowledge)


def add(ruled: PseudoLabelRound, case: str, label: np.ndarray, confidences: list[int], other: Any = None) -> None:
    ruled.add(case, label, volume(*confidences)[None], [label if other is None else other], voxel_volume=1.0)


def test_a_round_filters_voxels_and_cases_and_says_why(tmp_path: Path) -> None:
    store, ruled = prepared_round(tmp_path)
    add(ruled, "good", volume(0, 1, 1, 1, 2, 0, 1, 0), [250, 240, 200, 180, 130, 120, 255, 200])
    add(ruled, "empty", volume(0, 0, 0, 0, 0, 0, 0, 0), [255] * 8)
    assert not store.is_complete(5)
    with pytest.raises(InvalidInput):
        store.cases(5)
    ruled.finish(["good", "empty"])
    assert store.cases(5) == ["good"]
    report = json.loads((tmp_path / "step_5" / "report.json").read_text())
    assert report["cases"]["empty"]["reasons"] == ["class 1 is missing, 100% of the labeled cases show it"]
    assert report["cases"]["good"] == {
        "accepted": True,
        "reasons": [],
        "stability": 1.0,
        "agreement": None,
        "kept_share": 3 / 8,
        "volumes": {"class 1": 3.0, "class 2": 1.0},
        "weight": 1.0,
    }
    # background: 255 eight times, 250, 200, 120, of which half are the eight; class 1: 240, 200, 180, because the
    # island at the end counts no more; class 2: 130
    assert report["thresholds"] == {"background": 1.0, "class 1": 200 / 255, "class 2": 130 / 255}
    assert store.label(5, "good").ravel().tolist() == [0, 1, 1, 1, 2, 0, 0, 0]
    assert confidence_of(store, "good") == [0, 240, 200, 0, 130, 0, 0, 0]
    store.tidy(5)
    assert not list((tmp_path / "step_5").glob("*all_confidences*"))


def confidence_of(store: PseudoLabelStore, case: str, step: int = 5) -> list[int]:
    found: list[int] = open_array(store.paths(step, case)[1])[:].ravel().tolist()
    return found


def test_without_plausibility_islands_stay_and_nothing_is_odd(tmp_path: Path) -> None:
    store, ruled = prepared_round(tmp_path, plausibility=False, kept_share=1.0)
    add(ruled, "island", volume(1, 0, 1, 1), [255] * 4)
    add(ruled, "empty", volume(0, 0, 0, 0), [255] * 4)
    ruled.finish(["island", "empty"])
    assert store.cases(5) == ["island", "empty"]
    assert store.label(5, "island").ravel().tolist() == [1, 0, 1, 1]


def test_the_soft_filter_weighs_voxels_and_has_no_thresholds(tmp_path: Path) -> None:
    store, ruled = prepared_round(tmp_path, voxel_filter="weight")
    add(ruled, "case", volume(1, 1, 1), [85, 170, 255])
    ruled.finish(["case"])
    assert confidence_of(store, "case") == [0, 64, 255]
    assert json.loads((tmp_path / "step_5" / "report.json").read_text())["thresholds"] is None


def test_a_class_that_is_never_predicted_halves_the_patches(tmp_path: Path) -> None:
    store, ruled = prepared_round(tmp_path)
    add(ruled, "case", volume(1, 1, 1), [255] * 3)
    ruled.finish(["case"])
    report = json.loads((tmp_path / "step_5" / "report.json").read_text())
    assert report["classes_never_predicted"] == ["class 2"]
    assert store.weights(5) == {"case": 0.5}


@pytest.mark.parametrize(("limit", "ends"), [(0.98, True), (1.0, False), (None, False)])
def test_agreement_between_rounds_ends_the_run(tmp_path: Path, limit: float | None, ends: bool) -> None:
    for step in (5, 9):
        store, ruled = prepared_round(tmp_path, step, stop_agreement=limit)
        add(ruled, "case", volume(1, 1, 1, 2), [255] * 4)
        ruled.finish(["case"])
        assert store.ends_run(step) is (ends and step == 9)
    report = json.loads((tmp_path / "step_9" / "report.json").read_text())
    assert report["agreement_with_the_refresh_before"] == 1
    assert (report["ends_run"] is not None) is ends
    assert (store.cases(5), store.cases(9)) == (["case"], ["case"]), "every round stays on disk"


def test_without_any_case_the_run_ends_where_the_rules_let_it(tmp_path: Path) -> None:
    for step, limit in ((5, None), (9, 1.0)):
        store, ruled = prepared_round(tmp_path, step, stop_agreement=limit)
        add(ruled, "empty", volume(0, 0, 0), [255] * 3)
        ruled.finish(["empty"])
        assert store.cases(step) == []
        assert store.ends_run(step) is (limit is not None)


def test_a_version_goes_on_from_the_same_origin_only(tmp_path: Path) -> None:
    store, ruled = prepared_round(tmp_path)
    add(ruled, "first", volume(1, 1, 1), [255] * 3)
    store.begin(5, {"weights": 5})
    assert store.has(5, "first")
    assert not store.has(5, "second")
    store.begin(5, {"weights": 6})
    assert not store.has(5, "first"), "other weights: nothing of before is used"


# ------------------------------------------------------------------------------------------------------------- loading

NONE = StreamRequest(0)


def fold_source(tmp_path: Path, n: int = 3) -> FoldSource:
    tiny, shape = TinyStore(tmp_path / "cases"), (1, 12, 12)
    streams = Streams((), tuple(tiny.unlabeled(f"u{i}", code_image(shape)) for i in range(n)))
    plan = toy_configuration(2, patch_size=(12, 12), architecture=toy_architecture(2, (4,)))
    return FoldSource(streams, plan, toy_schema(), seed=0, store_folder=tmp_path / "stores")


def fill(source: FoldSource, step: int, weights: dict[str, float]) -> None:
    """Class 1 on the left with confidence 1, class 2 on the right, where nothing is kept."""
    store = PseudoLabelStore(source.store_folder / "pseudo")
    label = np.zeros((1, 12, 12), dtype=np.uint8)
    label[..., :2], label[..., 10:] = 1, 2
    store.begin(step)
    for case in source.streams.unlabeled:
        store.write_confidence(step, case.id, (label != 2).astype(np.uint8) * 255)
        store.write_case(step, case.id, label, None, {})
    store.complete(step, weights)
    source.reload_store("pseudo", step)


def unlabeled_batches(source: FoldSource, n: int = 20) -> list[Any]:
    request = BatchRequest(NONE, StreamRequest(3, store="pseudo", sampler="pseudo_foreground"))
    return [batch.unlabeled for batch in source.batches([(step, request) for step in range(n)])]


def test_only_accepted_cases_are_drawn_with_their_weights(tmp_path: Path) -> None:
    source = fold_source(tmp_path)
    fill(source, 1, {"u0": 1.0, "u2": 0.5})
    for batch in unlabeled_batches(source):
        assert set(batch.case_ids) <= {"u0", "u2"}
        assert batch.pseudo_weights.tolist() == [0.5 if case == "u2" else 1.0 for case in batch.case_ids]
    fill(source, 2, {"u1": 1.0})
    assert {case for batch in unlabeled_batches(source) for case in batch.case_ids} == {"u1"}, "the old version is gone"


def test_a_store_that_uses_no_case_gives_no_unlabeled_batch(tmp_path: Path) -> None:
    source = fold_source(tmp_path)
    with pytest.raises(InvalidInput, match="no pseudo-labels 'pseudo'"):
        unlabeled_batches(source, 1)
    fill(source, 1, {})
    assert unlabeled_batches(source, 2) == [None, None]
    plain = source.batches([(0, BatchRequest(NONE, StreamRequest(2)))])
    assert len(next(plain).unlabeled) == 2, "the pool itself is as it was"


def test_forced_foreground_is_confident_foreground(tmp_path: Path) -> None:
    source = fold_source(tmp_path)
    fill(source, 1, {"u0": 1.0})
    found = source.streams.unlabeled[0].stores["pseudo"]
    locations = CaseReader().locations_in_map(*found, toy_schema())
    assert set(locations["class 1"][:, 2].tolist()) == {0, 1}
    assert len(locations["class 2"]) == 0


# ---------------------------------------------------------------------------------------------------------------- loss


def logits_and_labels(regions: bool = False) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two patches of 16 × 16 with over 50 voxels of every class, logits at three levels."""
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(2, 1, 16, 16, dtype=torch.int64)
    target[:, :, :6], target[:, :, 10:] = 1, 2
    n = 2 if regions else 3
    z = [torch.randn(2, n, size, size, generator=generator, requires_grad=True) for size in (16, 8, 4)]
    return z, (torch.cat([target > 0, target == 2], 1).float() if regions else target)


@pytest.mark.parametrize("regions", [False, True])
def test_a_perfect_teacher_gives_the_supervised_loss(regions: bool) -> None:
    z, target = logits_and_labels(regions)
    kept = torch.ones(2, 1, 16, 16)
    expected = SupervisedLoss(regions=regions, batch_dice=False, has_ignore=False)(z, target, kept > 0)
    assert kept_label_loss(z, target, kept, regions=regions).item() == pytest.approx(expected.item(), abs=1e-6)
    half = kept_label_loss(z, target, kept, torch.tensor([0.5, 0.5]), regions=regions)
    assert half.item() == pytest.approx(expected.item() / 2, abs=1e-6)


@pytest.mark.parametrize("regions", [False, True])
def test_ignored_voxels_do_nothing_and_get_no_gradient(regions: bool) -> None:
    z, target = logits_and_labels(regions)
    kept = torch.ones(2, 1, 16, 16)
    kept[0, :, :, 8:] = 0
    loss = kept_label_loss(z, target, kept, regions=regions)
    loss.backward()
    assert z[0].grad is not None
    assert (z[0].grad[0, :, :, 8:] == 0).all()
    assert (z[0].grad[0, :, :, :8] != 0).any()
    other = [level.detach().clone() for level in z]
    other[0][0, :, :, 8:] = 1e4
    other[1][0, :, :, 4:] = float("nan")
    assert kept_label_loss(other, target, kept, regions=regions).item() == loss.item()


def test_a_patch_without_a_kept_voxel_costs_nothing() -> None:
    z, target = logits_and_labels()
    loss = kept_label_loss(z, target, torch.zeros(2, 1, 16, 16))
    loss.backward()
    assert loss.item() == 0
    assert all(level.grad is None or (level.grad == 0).all() for level in z)


def test_few_kept_voxels_of_a_class_have_no_dice() -> None:
    _, target = logits_and_labels()
    kept = torch.ones(2, 1, 16, 16)
    kept[0, :, :4, :], kept[1, :, 13:, :] = 0, 0  # 32 voxels of class 1 are left, and 48 of class 2
    assert judged_classes(target, kept, 3).tolist() == [[False, True], [True, False]]
    kept[1, 0, 13, :2] = 1
    assert judged_classes(target, kept, 3).tolist() == [[False, True], [True, True]]
    certain = torch.full((2, 3, 16, 16), -40.0).scatter_(1, target, 40.0)
    certain[0, :, 4:6] = torch.tensor([40.0, -40.0, -40.0])[:, None, None]  # class 1 of patch 0 taken for background
    wrong = kept_label_loss([certain], target, kept)
    cross_entropy = 80 * 32 / kept.sum()
    assert wrong.item() == pytest.approx(cross_entropy.item(), rel=1e-5), "no Dice of the class that has 32 voxels"


def test_soft_weights_average_the_cross_entropy() -> None:
    z = torch.zeros(1, 2, 16, 16)
    target = torch.zeros(1, 1, 16, 16, dtype=torch.int64)
    w = torch.full((1, 1, 16, 16), 0.25)
    assert kept_label_loss([z], target, w).item() == pytest.approx(np.log(2), abs=1e-6)
