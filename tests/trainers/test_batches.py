"""Batches: what is in them, that they are a function of the step, and that they show nothing that is hidden."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_store import TinyStore, code_image, code_label
from torch import Tensor

from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput
from autossl.data.store import open_array
from autossl.planners.plans import ConfigurationPlan
from autossl.trainers.base import Batch, BatchRequest, StreamBatch, StreamRequest
from autossl.trainers.batch_workers import _Pinnable
from autossl.trainers.batches import BatchMaker, LoadingError, Streams, UnlabeledCase, batch_iterator
from autossl.trainers.patch_reader import CaseReader
from toys import toy_architecture, toy_configuration, toy_schema

BOTH = BatchRequest(StreamRequest(3, sampler="foreground"), StreamRequest(3))
NONE = StreamRequest(0)


@pytest.fixture
def store(tmp_path: Path) -> TinyStore:
    return TinyStore(tmp_path)


def configuration(patch: tuple[int, ...], n_channels: int = 1, **changes: Any) -> ConfigurationPlan:
    architecture = toy_architecture(len(patch), (4,))
    return toy_configuration(len(patch), n_channels, patch_size=patch, architecture=architecture, **changes)


def two_pools(store: TinyStore, shape: tuple[int, int, int] = (9, 20, 22), n: int = 3) -> Streams:
    """Labeled and unlabeled cases whose images tell case and voxel: case number × 1e5 + index."""
    number = iter(range(1, 2 * n + 1))
    labeled = [store.labeled(f"l{i}", code_image(shape) + 1e5 * next(number), code_label(shape)) for i in range(n)]
    unlabeled = [store.unlabeled(f"u{i}", code_image(shape) + 1e5 * next(number)) for i in range(n)]
    return Streams(tuple(labeled), tuple(unlabeled))


def tensors(batch: Batch) -> Iterator[Tensor]:
    for stream in (batch.labeled, batch.unlabeled):
        for value in vars(stream).values() if stream is not None else ():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, tuple):
                yield from (entry for entry in value if isinstance(entry, Tensor))


def same(first: Batch, second: Batch) -> bool:
    names = [(b.labeled.case_ids, b.unlabeled.case_ids if b.unlabeled is not None else ()) for b in (first, second)]
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    return names[0] == names[1] and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


class _Unchanged:
    def apply(self, image: Tensor, seed: int) -> Tensor:
        return image


def without_intensity(maker: BatchMaker) -> BatchMaker:
    """The same maker, its images changed by geometry only."""
    maker._augmentation = replace(maker._augmentation, intensity=_Unchanged())
    return maker


# ------------------------------------------------------------------------------------------------------------ content


@pytest.mark.parametrize("patch", [(8, 10), (4, 8, 10)])
def test_shapes_and_types(store, patch):
    streams = two_pools(store)
    request = BatchRequest(StreamRequest(3, sampler="foreground"), StreamRequest(2, views=2))
    batch = BatchMaker(streams, configuration(patch), toy_schema(), seed=0, signed_distance=True).make(0, request)
    labeled, unlabeled = batch.labeled, batch.unlabeled
    assert labeled.image.shape == (3, 1, *patch)
    assert labeled.image.dtype == torch.float32
    assert labeled.target.shape == (3, 1, *patch)
    assert labeled.target.dtype == torch.int64
    assert labeled.valid.dtype == torch.bool
    assert labeled.valid.all()
    assert labeled.signed_distances.shape == (3, 2, *patch)
    assert labeled.signed_distances.abs().max() <= 1
    assert len(unlabeled.views) == len(unlabeled.valids) == 2
    assert unlabeled.targets is unlabeled.pseudo_labels is unlabeled.signed_distances is None
    assert unlabeled.centers.shape == (2, 3)
    assert unlabeled.has_channel.all()
    assert [entry["patient"] for entry in unlabeled.attributes] == list(unlabeled.case_ids)
    assert set(labeled.case_ids) <= {"l0", "l1", "l2"}


@pytest.mark.parametrize("patch", [(8, 10), (4, 8, 10)])
def test_unaugmented_patches_are_the_case_at_the_place_that_the_center_tells(store, patch):
    shape = (9, 20, 22)
    maker = BatchMaker(two_pools(store, shape), configuration(patch), toy_schema(), seed=1, augment=False)
    sizes = np.array((1,) * (3 - len(patch)) + patch)
    for step in range(20):
        labeled = maker.make(step, BOTH).labeled
        for b in range(3):
            start = np.rint(labeled.centers[b].numpy() * shape - sizes / 2).astype(int)
            box = tuple(slice(max(0, s), s + n) for s, n in zip(start, sizes, strict=True))
            codes = labeled.image[b, 0].numpy() - 1e5 * (1 + int(labeled.case_ids[b][1]))
            inside = labeled.image[b, 0].numpy() > 0
            np.testing.assert_array_equal(codes[inside], code_image(shape)[0][box].ravel())
            expected = np.where(inside, codes.astype(int) % 3, 0)
            np.testing.assert_array_equal(labeled.target[b, 0], expected)


def test_labeled_cases_can_be_seen_as_if_they_had_no_label(store):
    streams = two_pools(store)
    plan, request = configuration((8, 10)), StreamRequest(8, views=2, includes_labeled=True)
    maker = BatchMaker(streams, plan, toy_schema(), seed=0)
    seen = [maker.make(step, BatchRequest(NONE, request)) for step in range(4)]
    assert {name for batch in seen for name in batch.unlabeled.case_ids} == {"l0", "l1", "l2", "u0", "u1", "u2"}
    assert all(batch.unlabeled.targets is None for batch in seen)
    assert all(len(batch.labeled) == 0 for batch in seen)
    blind = replace(streams, labeled=tuple(replace(case, label=Path("nowhere")) for case in streams.labeled))
    again = BatchMaker(blind, plan, toy_schema(), seed=0).make(0, BatchRequest(NONE, request))
    assert same(seen[0], again), "no label file was opened"
    alone = BatchMaker(replace(streams, unlabeled=()), plan, toy_schema(), seed=0)
    assert set(alone.make(0, BatchRequest(NONE, request)).unlabeled.case_ids) <= {"l0", "l1", "l2"}
    with pytest.raises(ValueError, match="unlabeled stream only"):
        maker.make(0, BatchRequest(request, NONE))


def test_axes_that_are_not_mirrored(store):
    """The other axis is, and all else that is drawn stays as it was."""
    streams = two_pools(store, (8, 8, 8))
    maker = without_intensity(BatchMaker(streams, configuration((8, 8, 8)), toy_schema(), seed=3))

    def patches(*unmirrored: int) -> list[Tensor]:
        request = BatchRequest(NONE, StreamRequest(8, unmirrored_axes=unmirrored))
        return [image for step in range(6) for image in maker.make(step, request).unlabeled.image]

    found = {"usual": 0, "kept": 0}
    for usual, kept, still in zip(patches(), patches(0, 2), patches(0, 1, 2), strict=True):
        assert any(torch.equal(kept, each) for each in (still, still.flip(2)))
        assert any(torch.equal(usual, kept.flip(axes)) for axes in ([], [1], [3], [1, 3]))
        found["usual"] += not torch.equal(usual, kept)
        found["kept"] += not torch.equal(kept, still)
    assert found["usual"] > 24
    assert 12 < found["kept"] < 36


def test_labels_follow_codes_through_mirroring(store):
    """A patch that is flipped only holds the same voxels as the case, and each voxel keeps its label."""
    streams = two_pools(store, (4, 8, 8), n=1)
    maker = without_intensity(BatchMaker(streams, configuration((4, 8, 8)), toy_schema(), seed=0))
    first_corners = set()
    for step in range(12):
        labeled = maker.make(step, BatchRequest(StreamRequest(8), NONE)).labeled
        for image, target in zip(labeled.image[:, 0], labeled.target[:, 0], strict=True):
            codes = image.long() - 100_000
            if sorted(codes.flatten().tolist()) == list(range(1, 257)):
                assert torch.equal(target, codes % 3)
                first_corners.add(int(codes[0, 0, 0]))
    assert first_corners == {1, 8, 57, 64, 193, 200, 249, 256}  # all eight combinations of flips came up


def test_views_share_geometry_and_differ_in_intensity(store):
    maker = BatchMaker(two_pools(store), configuration((4, 8, 10)), toy_schema(), seed=0)
    request = BatchRequest(StreamRequest(4, views=2), StreamRequest(16, views=3))
    batch = maker.make(0, request)
    assert batch.labeled.targets[0] is batch.labeled.targets[1]
    assert batch.unlabeled.valids[0] is batch.unlabeled.valids[2]
    differing = 0
    for first, second in zip(*batch.unlabeled.views[:2], strict=True):
        orders = [torch.argsort(view.flatten()[:: view.numel() // 8]) for view in (first, second)]
        differing += not torch.equal(first, second)
        centered = [view - view.mean() for view in (first, second)]
        alike = float((centered[0] * centered[1]).sum() / (centered[0].norm() * centered[1].norm()).clamp(min=1e-6))
        assert torch.equal(*orders) or alike > 0.6
    assert differing > 8


def test_independent_views_have_their_own_geometry_and_targets(store):
    shape = (9, 20, 22)
    maker = without_intensity(BatchMaker(two_pools(store, shape), configuration((4, 8, 10)), toy_schema(), seed=0))
    shared = maker.make(3, BatchRequest(StreamRequest(8, views=2), NONE)).labeled
    own = maker.make(3, BatchRequest(StreamRequest(8, views=2, shared_geometry=False), NONE)).labeled
    assert torch.equal(own.views[0], shared.views[0])
    assert torch.equal(own.targets[0], shared.targets[0])
    assert not torch.equal(own.targets[0], own.targets[1])
    numbers = torch.tensor([1 + int(case[1]) for case in own.case_ids]).view(-1, 1, 1, 1, 1)
    for image, target in zip(own.views, own.targets, strict=True):
        view = image - 1e5 * numbers
        exact = (view == view.round()) & (view >= 1) & (view <= np.prod(shape))
        patches = [b for b in range(8) if exact[b].all() and len(view[b].unique()) == view[b].numel()]
        assert patches
        for b in patches:  # flipped only: every voxel still has its own label
            assert torch.equal(target[b], view[b].long() % 3)


def test_another_view_or_stream_changes_nothing_of_the_first(store):
    maker = BatchMaker(two_pools(store), configuration((4, 8, 10)), toy_schema(), seed=0)
    alone = maker.make(5, replace(BOTH, unlabeled=NONE))
    both = maker.make(5, replace(BOTH, unlabeled=StreamRequest(2, views=2)))
    assert alone.unlabeled is None
    assert torch.equal(alone.labeled.image, both.labeled.image)
    assert torch.equal(
        both.unlabeled.views[0], maker.make(5, replace(BOTH, unlabeled=StreamRequest(2))).unlabeled.image
    )


def test_no_unlabeled_case_and_repeated_labeled_ones(store):
    streams = Streams(two_pools(store, n=1).labeled)
    batch = BatchMaker(streams, configuration((8, 10)), toy_schema(), seed=0).make(0, BOTH)
    assert batch.unlabeled is None
    assert batch.labeled.case_ids == ("l0",) * 3


def test_nothing_labeled_requested_gives_an_empty_stream(store):
    request = BatchRequest(StreamRequest(0), StreamRequest(2))
    batch = BatchMaker(two_pools(store), configuration((8, 10)), toy_schema(), seed=0, signed_distance=True).make(
        0, request
    )
    assert len(batch.labeled) == 0
    assert batch.labeled.image.shape == (0, 1, 8, 10)
    assert batch.labeled.target.shape == (0, 1, 8, 10)
    assert len(batch.unlabeled) == 2


# -------------------------------------------------------------------------------------------------------- valid voxels


@pytest.mark.parametrize("patch", [(12, 14), (6, 12, 14)])
def test_padding_is_invalid_in_unlabeled_patches_and_background_in_labeled_ones(store, patch):
    shape = (4, 6, 9)
    image = np.full((1, *shape), 7, dtype=np.float32)
    streams = Streams((store.labeled("l", image, np.ones(shape)),), (store.unlabeled("u", image),))
    maker = BatchMaker(streams, configuration(patch), toy_schema(1), seed=0, augment=False)
    batch = maker.make(0, BOTH)
    visible = (1 if len(patch) == 2 else 4) * 6 * 9
    assert torch.equal(batch.unlabeled.valid, batch.unlabeled.image > 0)
    assert batch.unlabeled.valid.flatten(1).sum(1).tolist() == [visible] * 3
    assert batch.labeled.valid.all()
    assert torch.equal(batch.labeled.target, (batch.labeled.image > 0).long())


def test_voxels_brought_in_by_rotation_and_scaling_are_invalid_too(store):
    image = np.full((1, 1, 16, 16), 7, dtype=np.float32)
    maker = BatchMaker(Streams((), (store.unlabeled("u", image),)), configuration((16, 16)), toy_schema(), seed=0)
    without_intensity(maker)
    batch = maker.make(0, BatchRequest(NONE, StreamRequest(200)))
    image, valid = batch.unlabeled.image, batch.unlabeled.valid
    assert (image[valid] > 7 * 0.2).all()
    assert (image[~valid] <= 7 * 0.51).all()
    assert 0.01 < 1 - valid.float().mean() < 0.2


def test_ignored_voxels_are_invalid_background_and_patches_lie_where_labels_are(store):
    shape, schema = (1, 40, 40), toy_schema(1, ignore=True)
    label = np.full(shape, 2)
    label[0, 30:34, 30:34] = 0
    label[0, 34:36, 30:34] = 1
    classes = {"class 1": (1,), "annotated": (0, 1)}
    streams = Streams((store.labeled("l", code_image(shape), label, classes=classes),))
    maker = BatchMaker(streams, configuration((8, 8)), schema, seed=0, augment=False)
    for step in range(10):
        labeled = maker.make(step, replace(BOTH, unlabeled=NONE)).labeled
        codes = labeled.image.long() - 1
        rows, columns = codes // 40, codes % 40
        annotated = (rows >= 30) & (rows < 36) & (columns >= 30) & (columns < 34)
        assert torch.equal(labeled.valid, annotated)
        assert annotated.flatten(1).any(1).all()
        assert torch.equal(labeled.target == 1, annotated & (rows >= 34))
        assert (labeled.target[2] == 1).any()


def test_forced_patches_lie_at_a_class_and_the_others_anywhere_annotated(store):
    shape, schema = (1, 60, 60), toy_schema(1, ignore=True)
    label = np.zeros(shape)
    label[0, 50, 50] = 1
    classes = {"class 1": (1,), "annotated": (0, 1)}
    streams = Streams((store.labeled("l", code_image(shape), label, classes=classes),))
    maker = BatchMaker(streams, configuration((8, 8)), schema, seed=0, augment=False)
    hits = np.zeros(3, dtype=int)
    for step in range(30):
        hits += maker.make(step, replace(BOTH, unlabeled=NONE)).labeled.target.flatten(1).any(1).numpy()
    assert hits[2] == 30
    assert hits[:2].max() < 10


def test_masked_channels_stay_zero_outside_the_nonzero_region(store):
    shape = (1, 16, 16)
    nonzero = np.zeros(shape, dtype=bool)
    nonzero[:, 4:12, 4:12] = True
    image = np.stack([np.where(nonzero, 3.0, 0), np.full(shape, 3.0)]).astype(np.float32)
    streams = Streams((store.labeled("l", image, nonzero.astype(int), nonzero),))
    plan = configuration((16, 16), n_channels=2, use_mask_for_norm=(True, False))
    maker = BatchMaker(streams, plan, toy_schema(1), seed=0)
    changed = 0
    for step in range(40):
        labeled = maker.make(step, BatchRequest(StreamRequest(2), NONE)).labeled
        outside = labeled.target[:, 0] == 0
        assert (labeled.image[:, 0][outside] == 0).all()
        changed += int((labeled.image[:, 1][outside] != 3).any())
    assert changed > 10


# ------------------------------------------------------------------------------------------------- targets and samplers


def test_region_targets_are_overlapping_maps_in_output_order(store):
    shape = (1, 16, 16)
    label = np.zeros(shape, dtype=int)
    label[0, 2:14, 2:14] = 1
    label[0, 6:10, 6:10] = 2
    schema = toy_schema(regions=True)
    streams = Streams((store.labeled("l", code_image(shape), label, classes=schema.foreground),))
    maker = BatchMaker(streams, configuration((16, 16)), schema, 0, augment=False, signed_distance=True)
    labeled = maker.make(0, replace(BOTH, unlabeled=NONE)).labeled
    assert labeled.target.dtype == torch.float32
    whole, core = torch.zeros(2, 16, 16)
    codes = labeled.image[0, 0].long() - 1
    where = (codes // 16, codes % 16)
    whole, core = torch.tensor(label[0] > 0)[where], torch.tensor(label[0] == 2)[where]
    seen = labeled.image[0, 0] > 0
    assert torch.equal(labeled.target[0], torch.stack([whole & seen, core & seen]).float())
    assert torch.equal(labeled.signed_distances < 0, (labeled.signed_distances < 0) & (labeled.target > 0))


def test_label_values_with_gaps_become_output_channels(store):
    schema = LabelSchema({"background": (0,), "high": (7,), "low": (3,)})
    label = np.full((1, 8, 8), 3)
    label[0, :4] = 7
    streams = Streams((store.labeled("l", code_image((1, 8, 8)), label),))
    request = BatchRequest(StreamRequest(2), NONE)
    target = BatchMaker(streams, configuration((8, 8)), schema, 0, augment=False).make(0, request).labeled.target
    assert target.unique().tolist() == [1, 2]
    assert (target[0, 0, :4] == 2).all()


@pytest.mark.parametrize("patch", [(8, 8), (6, 8, 8)])
def test_the_last_third_has_foreground_and_every_class_comes_up(store, patch):
    shape = (40, 50, 60)
    label = np.zeros(shape, dtype=int)
    label[3, 45, 2] = 1
    label[20:22, 20:24, 30:33] = 2
    streams = Streams((store.labeled("l", np.zeros((1, *shape)), label),))
    maker = BatchMaker(streams, configuration(patch), toy_schema(3), seed=0, augment=False)
    counts, classes = np.zeros(6, dtype=int), set()
    for step in range(40):
        target = maker.make(step, BatchRequest(StreamRequest(6, sampler="foreground"), NONE)).labeled.target
        counts += (target > 0).flatten(1).any(1).numpy()
        classes |= set(target[4:].unique().tolist())
    assert counts[4:].tolist() == [40, 40]
    assert counts[:4].max() < 20
    assert classes == {0, 1, 2}


def test_foreground_sampling_of_a_case_without_foreground_is_uniform(store):
    streams = Streams((store.labeled("l", code_image((3, 20, 20)), np.zeros((3, 20, 20))),))
    maker = BatchMaker(streams, configuration((8, 8)), toy_schema(), seed=0)
    centers = torch.cat([maker.make(s, replace(BOTH, unlabeled=NONE)).labeled.centers for s in range(20)])
    assert len(centers[:, 0].unique()) == 3
    assert maker.make(0, BOTH).labeled.target.max() == 0


def test_cases_are_drawn_evenly(store):
    maker = BatchMaker(two_pools(store), configuration((2, 4, 4)), toy_schema(), seed=0, augment=False)
    drawn = [case for step in range(100) for case in maker.make(step, BOTH).unlabeled.case_ids]
    assert all(70 < drawn.count(case) < 130 for case in ("u0", "u1", "u2"))


# ------------------------------------------------------------------------------------------------------ pseudo-labels


def pseudo_streams(store: TinyStore) -> Streams:
    shape = (1, 40, 40)
    label = np.zeros(shape, dtype=np.uint8)
    label[0, 30:32, 30:32] = 2
    confidence = np.arange(1600).reshape(shape).astype(np.uint8)
    stores = {"teacher": (label, confidence)}
    return Streams((), (store.unlabeled("u", code_image(shape) / 1600, stores=stores),))


def test_pseudo_labels_come_along_with_the_shared_geometry(store):
    streams = pseudo_streams(store)
    maker = BatchMaker(streams, configuration((40, 40)), toy_schema(), seed=0)
    without_intensity(maker)
    request = BatchRequest(NONE, StreamRequest(24, views=2, store="teacher"))
    unlabeled = maker.make(0, request).unlabeled
    assert unlabeled.pseudo_labels[0] is unlabeled.pseudo_labels[1]
    exact = 0
    for b in range(24):
        codes = unlabeled.image[b, 0] * 1600 - 1
        if sorted(codes.round().long().flatten().tolist()) != list(range(1600)):
            continue  # rotated or scaled
        exact += 1
        codes = codes.round().long()
        expected = 2 * ((codes // 40 >= 30) & (codes // 40 < 32) & (codes % 40 >= 30) & (codes % 40 < 32))
        assert torch.equal(unlabeled.pseudo_labels[0][b, 0], expected)
        assert torch.allclose(unlabeled.pseudo_confidences[0][b, 0], (codes % 256) / 255)
    assert exact > 3
    assert unlabeled.pseudo_labels[0].dtype == torch.int64
    assert unlabeled.pseudo_confidences[0].shape == (24, 1, 40, 40)
    assert set(unlabeled.pseudo_labels[0].unique().tolist()) == {0, 2}


def test_pseudo_foreground_guides_the_last_third(store):
    maker = BatchMaker(pseudo_streams(store), configuration((8, 8)), toy_schema(), seed=0, augment=False)
    request = BatchRequest(NONE, StreamRequest(3, sampler="pseudo_foreground", store="teacher"))
    for step in range(20):
        assert (maker.make(step, request).unlabeled.pseudo_labels[0][2] == 2).any()


def test_requests_that_make_no_sense_are_refused(store):
    maker = BatchMaker(two_pools(store, n=1), configuration((8, 8)), toy_schema(), seed=0)
    wrong = [
        BatchRequest(StreamRequest(1, sampler="pseudo_foreground"), NONE),
        BatchRequest(StreamRequest(1, store="x"), NONE),
        BatchRequest(NONE, StreamRequest(1, sampler="foreground")),
        BatchRequest(NONE, StreamRequest(1, sampler="pseudo_foreground")),
        BatchRequest(NONE, StreamRequest(1, views=0)),
    ]
    for request in wrong:
        with pytest.raises(ValueError):
            maker.make(0, request)
    with pytest.raises(InvalidInput, match="case u0: no pseudo-labels 'x'"):
        maker.make(0, BatchRequest(NONE, StreamRequest(1, store="x")))
    with pytest.raises(InvalidInput, match="no labeled training case"):
        BatchMaker(Streams(()), configuration((8, 8)), toy_schema(), seed=0).make(0, BOTH)


# ---------------------------------------------------------------------------------------------------------------- leaks


def test_a_planted_label_of_an_unlabeled_case_is_never_opened(store, monkeypatch):
    streams = two_pools(store, n=2)
    planted = store.root / "labels" / "u0.b2nd"
    planted.write_bytes(b"whoever reads this fails")
    opened = noted_openings(monkeypatch)
    maker = BatchMaker(streams, configuration((8, 10)), toy_schema(), seed=0)
    assert not any(isinstance(value, Path) and "labels" in value.parts for value in vars(streams.unlabeled[0]).values())
    drawn = {case for step in range(10) for case in maker.make(step, BOTH).unlabeled.case_ids}
    assert drawn == {"u0", "u1"}
    assert planted not in opened
    assert {path.parent.name for path in opened if path.stem in drawn} == {"images"}


def noted_openings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Fills up with the paths of all arrays that a reader opens from now on."""
    opened: list[Path] = []
    monkeypatch.setattr(
        "autossl.trainers.patch_reader.open_array", lambda path: opened.append(path) or open_array(path)
    )
    return opened


# ---------------------------------------------------------------------------------------------------------- determinism


@pytest.fixture
def maker(store) -> BatchMaker:
    return BatchMaker(two_pools(store), configuration((4, 8, 10)), toy_schema(), seed=0, signed_distance=True)


def steps_from(start: int, stop: int) -> list[tuple[int, BatchRequest]]:
    return [(step, replace(BOTH, unlabeled=StreamRequest(2, views=1 + step % 2))) for step in range(start, stop)]


def test_batches_do_not_depend_on_workers_or_on_where_one_starts(maker):
    by_workers = []
    for num_workers in (0, 1, 2):
        with batch_iterator(maker, steps_from(0, 6), num_workers) as batches:
            by_workers.append(list(batches))
    assert [len(batches) for batches in by_workers] == [6, 6, 6]
    for batches in by_workers[1:]:
        assert all(same(a, b) for a, b in zip(by_workers[0], batches, strict=True))
    with batch_iterator(maker, steps_from(4, 6), 1) as later:
        assert all(same(a, b) for a, b in zip(by_workers[0][4:], later, strict=True))
    assert not same(by_workers[0][0], by_workers[0][2])


def test_seed_rank_and_step_decide(maker):
    first = maker.make(2, BOTH)
    assert same(first, pickle.loads(pickle.dumps(maker)).make(2, BOTH))
    others = [
        BatchMaker(maker.streams, maker.configuration, maker.schema, seed, rank, signed_distance=True)
        for seed, rank in ((1, 0), (0, 1))
    ]
    assert not any(same(first, other.make(2, BOTH)) for other in others)


def test_the_number_of_threads_decides_nothing(store):
    """Torch splits sums over more than 32768 numbers among its threads, which changes their last bits."""
    image = np.random.default_rng(0).normal(size=(1, 40, 48, 48)).astype(np.float32)
    maker = BatchMaker(Streams((), (store.unlabeled("u", image),)), configuration((32, 48, 48)), toy_schema(), seed=0)
    request = BatchRequest(NONE, StreamRequest(4, views=2))
    threads = torch.get_num_threads()
    made = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            made.append(maker.make(0, request))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert same(*made)


def test_the_global_generators_are_left_alone(maker):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    maker.make(0, BOTH)
    with batch_iterator(maker, steps_from(0, 2), 1) as batches:
        list(batches)
    assert torch.equal(states[0], torch.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


# -------------------------------------------------------------------------------------------------------------- workers


def worker_pids(batches: Any) -> list[int]:
    return [worker.pid for worker in batches._source._workers]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


class Ending:
    """A worker whose connections are broken, and whose exit code the system tells a little later."""

    def __init__(self) -> None:
        self.pid, self.exitcode = 1, None
        self.sentinel, other = os.pipe()
        os.close(other)

    def join(self, timeout: float) -> None:
        self.exitcode = -signal.SIGKILL


def test_a_worker_that_is_about_to_end_is_waited_for(maker):
    batches = batch_iterator(maker, steps_from(0, 2), 2)
    list(batches)
    assert "it was killed by SIGKILL" in str(batches._died([Ending()], "Connection reset by peer"))


class Deadly(BatchMaker):
    """Ends the worker in the middle of step 9."""

    def make(self, step, request):
        if step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().make(step, request)


def test_a_worker_that_is_killed_at_its_work_is_told_with_its_cases_and_memory(maker, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr("torch.utils.data.dataloader._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    deadly = Deadly(maker.streams, maker.configuration, maker.schema, seed=0)
    steps = steps_from(0, 1000)
    batch = maker.make(*steps[9])
    cases = ", ".join(dict.fromkeys((*batch.labeled.case_ids, *batch.unlabeled.case_ids)))
    batches = batch_iterator(deadly, steps, 2)
    pids, began = worker_pids(batches), time.monotonic()
    with pytest.raises(LoadingError) as caught:
        list(batches)
    assert time.monotonic() - began < 30
    assert f"died at the batch of step 9 (cases {cases}): it was killed by SIGKILL" in str(caught.value)
    assert re.search(r"GiB in the worker, \d+\.\d\d GiB free, .*--num_workers", str(caught.value))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # no zombies either


def test_a_dead_worker_is_noticed_before_its_batch_is_due(maker):
    batches = batch_iterator(maker, steps_from(7, 1000), 2)
    next(batches)
    time.sleep(0.5)  # both have made what they were asked for
    os.kill(worker_pids(batches)[0], signal.SIGKILL)
    time.sleep(0.2)  # what runs meanwhile is not interrupted
    with pytest.raises(LoadingError, match=r"worker died at the batch of step \d+ \(cases .*SIGKILL"):
        next(batches)
    assert next(batches, None) is None


def test_workers_end_at_once_with_a_killed_training(maker, tmp_path):
    child = os.fork()
    if child == 0:
        try:
            batches = batch_iterator(maker, steps_from(0, 1000), 2)
            next(batches)
            (tmp_path / "pids").write_text(" ".join(map(str, worker_pids(batches))))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    pids, until = [int(pid) for pid in (tmp_path / "pids").read_text().split()], time.monotonic() + 3
    assert len(pids) == 2
    while any(is_running(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(is_running(pid) for pid in pids)  # by itself torch looks every five seconds


def test_closing_or_abandoning_ends_the_workers(maker):
    for end in ("close", "drop"):
        batches = batch_iterator(maker, steps_from(0, 1000), 2)
        next(batches)
        pids = worker_pids(batches)
        assert all(is_running(pid) for pid in pids)
        if end == "close":
            batches.close()
            batches.close()
            assert next(batches, None) is None
        del batches
        deadline = time.monotonic() + 5
        while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(is_running(pid) for pid in pids)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_file_is_named_with_its_case(maker, num_workers):
    damaged = maker.streams.unlabeled[0].image
    damaged.write_bytes(damaged.read_bytes()[:200])
    with batch_iterator(maker, steps_from(0, 50), num_workers) as batches, pytest.raises(InvalidInput) as caught:
        list(batches)
    assert caught.value.problems[0].file == damaged
    assert "autossl_plan_and_preprocess" in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_of_ours_names_step_stream_and_case(maker, num_workers):
    missing = replace(maker.streams.unlabeled[0], image=Path("not/there.b2nd"), id="u7")
    broken = BatchMaker(Streams(maker.streams.labeled, (missing,)), maker.configuration, maker.schema, seed=0)
    broken._sizes = None
    with (
        batch_iterator(broken, steps_from(3, 9), num_workers) as batches,
        pytest.raises(LoadingError, match=r"step 3") as caught,
    ):
        next(batches)
    assert "of the labeled stream, case l" in str(caught.value)


def test_pinning_copies_each_tensor_once_and_keeps_the_rest(maker, monkeypatch):
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self.clone())
    batch = maker.make(0, BatchRequest(StreamRequest(2), StreamRequest(2, views=2)))
    pinned = _Pinnable(batch).pin_memory()
    assert same(batch, pinned)
    assert all(a is not b for a, b in zip(tensors(batch), tensors(pinned), strict=True))
    assert pinned.unlabeled.valids[0] is pinned.unlabeled.valids[1]
    assert pinned.unlabeled.attributes == batch.unlabeled.attributes


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_asking_for_pinned_memory_without_a_gpu_gives_plain_batches(maker):
    with batch_iterator(maker, steps_from(0, 2), 1, pin_memory=True) as batches:
        assert all(same(batch, maker.make(*item)) for batch, item in zip(batches, steps_from(0, 2), strict=True))


# --------------------------------------------------------------------------------------------------------------- reader


def test_boxes_are_read_exactly_and_padded_with_zeros(store):
    image = np.random.default_rng(0).normal(size=(2, 5, 70, 90)).astype(np.float32)
    case = store.unlabeled("u", image)
    reader = CaseReader(max_open=1)
    rng = np.random.default_rng(1)
    padded = np.pad(image, [(0, 0)] + [(100, 100)] * 3)
    for _ in range(50):
        start = [int(rng.integers(-20, n + 10)) for n in image.shape[1:]]
        size = [int(rng.integers(1, 40)) for _ in range(3)]
        box = (slice(None), *(slice(100 + s, 100 + s + k) for s, k in zip(start, size, strict=True)))
        np.testing.assert_array_equal(reader.read(case.image, start, size), padded[box])


def test_the_reader_keeps_few_files_open(store, monkeypatch):
    cases = [store.unlabeled(f"u{i}", code_image((1, 4, 4))) for i in range(4)]
    opened = noted_openings(monkeypatch)
    reader = CaseReader(max_open=2)
    for index in (0, 1, 0, 1, 2, 0):
        reader.read(cases[index].image, (0, 0, 0), (1, 4, 4))
    assert [path.stem for path in opened] == ["u0", "u1", "u2", "u0"]


def test_an_unlabeled_case_has_no_place_for_a_label():
    assert not {"label", "locations"} & set(UnlabeledCase.__dataclass_fields__)
    assert {"targets"} <= set(StreamBatch.__dataclass_fields__)
