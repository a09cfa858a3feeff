"""The checks of FSMIFNet: similarity among tokens, fusion of images and feature maps, through `losses()`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autossl.inference.predictor import Predictor, Window
from autossl.networks.features import decode, encode
from autossl.trainers.base import Batch, Job, MethodSettings, ParameterGroup, Progress, StepOutput
from autossl.trainers.components import similarity
from autossl.trainers.components.losses import hard_label_loss
from autossl.trainers.components.similarity import (
    Decisions,
    affinity,
    key_tokens,
    pooled_tokens,
    propagate,
    propagation_loss,
    relation_loss,
    relation_pairs,
)
from autossl.trainers.methods import fsmifnet
from autossl.trainers.methods.fsmifnet import SimilarityFusion, SimilarityFusionSettings, deep_stage
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.registry import make_settings
from toys import toy_architecture, toy_batch, toy_configuration, toy_job, toy_schema

WARM = Progress(step=4, total=100)
AT = Progress(step=50, total=100)
EARLY = Progress(step=15, total=100)
ANISOTROPIC = toy_configuration(
    3,
    patch_size=(4, 16, 16),
    spacing=(5.0, 1.0, 1.0),
    architecture=toy_architecture(3, (4, 8, 8), True, ((1, 2, 2), (2, 2, 2))),
)
EVERYTHING = ("supervised", "supervised_mixed", "pseudo", "supervised_fused", "pseudo_fused", "consistency")
FSM = ("propagation", "relation")


def trainer(job: Job | None = None, **settings: Any) -> SimilarityFusion:
    return SimilarityFusion(job or toy_job(), SimilarityFusionSettings(**settings))


def differing(method: SimilarityFusion, sure: float = 1.0) -> SimilarityFusion:
    """With a teacher that is not the student, and logits so much larger."""
    method.teacher.network.load_state_dict(method.job.build_network("another").state_dict())
    with torch.no_grad():
        for head in method.teacher.network.decoder.seg_layers:  # type: ignore[union-attr]
            head.weight *= sure
    return method


def unlabeled_image(batch: Batch) -> Tensor:
    assert batch.unlabeled is not None
    return batch.unlabeled.image


def clusters(k: int, classes: int = 2) -> tuple[Tensor, Tensor]:
    """Orthogonal clusters of k equal tokens each: embeddings [classes·k, 4] and one-hot probabilities."""
    labels = torch.arange(classes).repeat_interleave(k)
    return torch.eye(4)[labels], torch.eye(classes)[labels]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# --------------------------------------------------------------------------------------------------- similarity, alone


@pytest.mark.parametrize("k", [8, 600])
def test_affinity_stays_within_a_cluster(k: int) -> None:
    e, _ = clusters(k)
    everything = torch.arange(2 * k)
    a = affinity(e, everything, everything, tau=0.1)
    assert a.sum(1) == pytest.approx(torch.ones(2 * k), abs=1e-5)
    assert a.diagonal().eq(0).all()
    same = torch.block_diag(torch.ones(k, k), torch.ones(k, k)).bool()
    weight = (k - 1) * math.exp(10)
    assert torch.where(same, a, 0).sum(1) == pytest.approx(torch.full((2 * k,), weight / (weight + k)), abs=1e-5)
    assert weight / (weight + k) > 0.999


def test_propagated_labels_are_the_clusters_and_overrule_one_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "ROWS_AT_ONCE", 5)
    k = 21
    e, q = clusters(k)
    keys = torch.arange(2 * k)
    assert torch.allclose(propagate(e, q, keys, 0.1), q, atol=1e-3)
    wrong = q.clone()
    wrong[0] = q[-1]
    found = propagate(e, wrong, keys, 0.1)
    assert torch.allclose(found[0], q[0], atol=1e-3), "it does not see itself"
    assert torch.allclose(found[1:k, 1], torch.full((k - 1,), 1 / (k - 1)), atol=1e-3), "one of k - 1 others"
    assert torch.allclose(found[k:], q[k:], atol=1e-3)
    only = torch.tensor([k, k + 1])
    assert torch.allclose(propagate(e, q, only, 0.1)[:, 1], torch.ones(2 * k)), "nothing else speaks"


def test_keys_are_confident_valid_and_balanced() -> None:
    labels = torch.zeros(6000, dtype=torch.long)
    labels[:20], labels[20:23] = 1, 2
    confidence, valid = torch.full((6000,), 0.7), torch.ones(6000, dtype=torch.bool)
    confidence[23:5800], valid[5800:5850] = 0.59, False
    keys = key_tokens(Decisions(labels, confidence), valid, generator()).tolist()
    assert len(keys) == len(set(keys)) == 20 + 3 + 64, "a rare class has what it has, a common one no more than 64"
    assert set(range(23)) <= set(keys) <= {*range(23), *range(5850, 6000)}
    again = key_tokens(Decisions(labels, confidence), valid, torch.Generator().manual_seed(4)).tolist()
    assert set(again) != set(keys)
    alike = key_tokens(Decisions(torch.arange(9000) % 2, torch.ones(9000)), torch.ones(9000).bool(), generator())
    assert torch.bincount(alike % 2).tolist() == [2048, 2048]
    alone = key_tokens(Decisions(labels[100:3000], torch.ones(2900)), valid[100:3000], generator())
    assert sorted(alone.tolist()) == list(range(2900))


def test_without_confident_tokens_all_are_keys() -> None:
    labels, valid, confidence = torch.zeros(100, dtype=torch.long), torch.ones(100).bool(), torch.full((100,), 0.5)
    valid[99] = False
    assert sorted(key_tokens(Decisions(labels, confidence), valid, generator()).tolist()) == list(range(99))
    confidence[:15] = 0.6
    assert len(key_tokens(Decisions(labels, confidence), valid, generator())) == 99
    confidence[15] = 0.6
    assert sorted(key_tokens(Decisions(labels, confidence), valid, generator()).tolist()) == list(range(16))
    assert len(key_tokens(Decisions(labels, confidence), torch.zeros_like(valid), generator())) == 0


def test_tokens_are_means_of_valid_voxels() -> None:
    p, valid = torch.rand(2, 3, 8, 4), torch.ones(2, 1, 8, 4, dtype=torch.bool)
    tokens, known = pooled_tokens(p, valid, (4, 2))
    assert tokens.shape == (16, 3)
    assert torch.allclose(tokens[8 + 2 * 1 + 1], p[1, :, 2:4, 2:4].mean((1, 2))), "image by image, row by row"
    assert known.all()
    valid[0, :, :1, :2], valid[0, :, 2:4, :2], valid[0, :, 4, 0], valid[0, :, 5, :2] = False, False, False, False
    tokens, known = pooled_tokens(p, valid, (4, 2))
    assert torch.allclose(tokens[0], p[0, :, 1, :2].mean(1))
    assert known.tolist() == [True, True, False, True, False, *[True] * 11]
    assert torch.isfinite(tokens).all()


def test_decisions_of_labels_and_regions() -> None:
    q = torch.tensor([[0.9, 0.6], [0.2, 0.7], [0.8, 0.1]])
    assert Decisions.of(q).labels.tolist() == [0, 1, 0]
    assert Decisions.of(q).confidence.tolist() == pytest.approx([0.9, 0.7, 0.8])
    assert Decisions.of(q, regions=True).labels.tolist() == [3, 2, 1]
    assert Decisions.of(q, regions=True).confidence.tolist() == pytest.approx([0.6, 0.7, 0.8])


def test_propagation_loss_closed_form() -> None:
    p = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.25, 0.75], [0.9, 0.1]], requires_grad=True)
    found = torch.tensor([[0.7, 0.3], [0.7, 0.3], [0.2, 0.8], [1.0, 0.0]])
    q = torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.6, 0.4], [0.9, 0.1]])
    valid = torch.tensor([True, True, True, False])
    loss, share = propagation_loss(p, found, q, valid)
    sharp = 0.64 / 0.68
    third = -(1 - sharp) * math.log(0.25) - sharp * math.log(0.75)
    assert loss.item() == pytest.approx((math.log(2) + third) / 2, abs=1e-4), "agreement, or 0.8 of confidence"
    assert share.item() == pytest.approx(2 / 3)
    loss.backward()
    assert p.grad is not None
    assert p.grad[[1, 3]].eq(0).all()
    nothing, share = propagation_loss(p, found, q, torch.zeros(4, dtype=torch.bool))
    assert (nothing.item(), share.item(), nothing.requires_grad) == (0, 0, True)
    assert not torch.isfinite(propagation_loss(p, found * math.nan, q, valid)[0])


def test_propagation_loss_of_regions_judges_each_region() -> None:
    p = torch.tensor([[0.5, 0.25]], requires_grad=True)
    found, q = torch.tensor([[0.7, 0.6]]), torch.tensor([[0.6, 0.4]])
    loss, share = propagation_loss(p, found, q, torch.tensor([True]), regions=True)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-4), "the second region is neither agreed on nor sure"
    assert share.item() == 0.5
    sharp = 0.81 / (0.81 + 0.01)
    loss, share = propagation_loss(p, torch.tensor([[0.7, 0.9]]), q, torch.tensor([True]), regions=True)
    second = -sharp * math.log(0.25) - (1 - sharp) * math.log(0.75)
    assert loss.item() == pytest.approx((math.log(2) + second) / 2, abs=1e-4)
    assert share.item() == 1


def test_relation_loss_closed_forms() -> None:
    e, labels = torch.eye(4, requires_grad=True), torch.tensor([0, 0, 1, 1])
    pairs = torch.tensor([[0, 1], [0, 2], [1, 3], [2, 3]])
    assert relation_loss(e, labels, pairs).item() == pytest.approx(math.log(2))
    same = torch.ones(2, 1, requires_grad=True)
    assert relation_loss(same, torch.tensor([1, 1]), torch.tensor([[0, 1]])).item() == pytest.approx(0, abs=2e-6)
    opposite = torch.tensor([[1.0], [-1.0]])
    assert relation_loss(opposite, torch.tensor([0, 1]), torch.tensor([[0, 1]])).item() == pytest.approx(0, abs=2e-6)
    assert relation_loss(opposite, torch.tensor([1, 1]), torch.tensor([[0, 1]])).item() > 10
    nothing = relation_loss(e, labels, pairs[:0])
    assert nothing.item() == 0
    assert nothing.requires_grad


def test_pairs_are_half_alike_half_different_and_believed() -> None:
    labels = torch.tensor([5] * 200 + [1] * 10 + [0] + [3] * 40)
    believed = torch.ones(251, dtype=torch.bool)
    believed[100:200] = believed[240:] = False
    pairs = relation_pairs(labels, believed, generator())
    i, j = labels[pairs[:, 0]], labels[pairs[:, 1]]
    assert believed[pairs].all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert int((i != j).sum()) == 1024
    assert 700 < int((i == j).sum()) < 830, "a class of one token, a quarter of the draws, has no pair alike"
    assert not (i[i == j] == 0).any()
    assert 0.2 < float((i[i == j] == 1).float().mean()) < 0.46, "classes come alike often, however rare"
    alone = relation_pairs(torch.zeros(30, dtype=torch.long), torch.ones(30, dtype=torch.bool), generator())
    assert len(alone) == 1024
    assert (alone[:, 0] != alone[:, 1]).all()
    assert relation_pairs(labels, torch.zeros_like(believed), generator()).shape == (0, 2)
    assert relation_pairs(labels[:1], believed[:1], generator()).shape == (0, 2)


# -------------------------------------------------------------------------------------------------------------- fusion


class Decoded:
    """What the student decoded: lists of skips, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[list[Tensor], list[Tensor]]] = []

        def spy(network: nn.Module, skips: list[Tensor]) -> Any:
            answer = decode(network, skips)
            self.calls.append((list(skips), answer[0]))
            return answer

        monkeypatch.setattr(fsmifnet, "decode", spy)


@pytest.mark.parametrize("configuration", [toy_configuration(2), ANISOTROPIC], ids=["2d", "anisotropic"])
def test_feature_maps_are_fused_with_the_mask_of_the_images(
    configuration: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = toy_job(configuration=configuration)
    method, decoded, batch = trainer(job), Decoded(monkeypatch), toy_batch(job)
    mask = method._mask(1, batch.labeled.image, AT)
    images: list[Tensor] = []
    method.parts.trained["network"].register_forward_hook(lambda _, x, z: images.append(x[0]))
    method.losses(batch, AT)
    labeled, unlabeled = batch.labeled.image, unlabeled_image(batch)
    expected = [torch.where(mask, unlabeled[:1], labeled[:1]), torch.where(mask, labeled[1:], unlabeled[1:])]
    assert torch.equal(images[0], torch.cat(expected))
    (plain, _), (fused, _) = decoded.calls
    assert len(plain) == len(fused) == 3
    for own, f in zip(plain, fused, strict=True):
        own_l, own_u = own[:2], own[2:]
        assert f.shape == (2, *own.shape[1:])
        from_unlabeled, from_labeled = (f[:1] == own_u[:1]).all(1, True), (f[:1] == own_l[:1]).all(1, True)
        assert (from_unlabeled | from_labeled).all()
        scale = [a // b for a, b in zip(mask.shape[2:], f.shape[2:], strict=True)]
        centers = mask[(slice(None), slice(None), *(slice(step // 2, None, step) for step in scale))]
        assert torch.equal(from_unlabeled | centers, from_unlabeled), "the mask at the middle of each position"
        assert torch.equal(f[:1], torch.where(centers, own_u[:1], own_l[:1]))
        assert torch.equal(f[1:], torch.where(centers, own_l[1:], own_u[1:]))


@pytest.mark.parametrize("value", [True, False])
def test_with_a_constant_mask_fused_features_are_those_of_one_stream(
    value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, decoded = trainer(), Decoded(monkeypatch)
    batch = toy_batch(method.job)
    monkeypatch.setattr(method, "_mask", lambda n, image, at: torch.full((n, 1, 16, 16), value))
    method.losses(batch, AT)
    network = method.parts.trained["network"]
    skips = encode(network, torch.cat([batch.labeled.image, unlabeled_image(batch)]))
    rows = [2, 1] if value else [0, 3]  # u_a and l_b, or l_a and u_b
    expected = decode(network, [f[rows] for f in skips])[0][0]
    assert torch.equal(decoded.calls[1][1][0], expected)


def test_every_voxel_is_judged_by_the_image_that_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    method = differing(trainer(alpha=0.3, lambda_features=0.4))
    decoded, batch = Decoded(monkeypatch), toy_batch(method.job)
    images: list[Any] = []
    method.parts.trained["network"].register_forward_hook(lambda _, x, z: images.append(z))
    output = method.losses(batch, AT)
    mask, y = method._mask(1, batch.labeled.image, AT), batch.labeled.target
    pseudo = method.teacher.logits(unlabeled_image(batch)).argmax(1, keepdim=True)
    fused = decoded.calls[1][1][:1]
    for z, ending, weight in ((images[0], "", 1.0), (fused, "_fused", 0.4)):
        z_1, z_2 = [level[:1] for level in z], [level[1:] for level in z]
        true = 0.5 * (hard_label_loss(z_1, y[:1], ~mask) + hard_label_loss(z_2, y[1:], mask))
        guessed = 0.5 * (hard_label_loss(z_1, pseudo[:1], mask) + hard_label_loss(z_2, pseudo[1:], ~mask))
        name = "supervised_fused" if ending else "supervised_mixed"
        assert output.losses[name].item() == pytest.approx(weight * true.item(), rel=1e-5)
        assert output.losses[f"pseudo{ending}"].item() == pytest.approx(weight * 0.3 * guessed.item(), rel=1e-5)
    twin = Supervised(method.job, MethodSettings())
    twin.parts.trained["network"].load_state_dict(method.parts.trained["network"].state_dict())
    clean = twin.losses(batch, AT).losses["supervised"]
    assert output.losses["supervised"].item() == pytest.approx(clean.item(), rel=1e-5)


def test_consistency_compares_fused_images_with_fused_features(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer(lambda_cons=0.6, lambda_max=0.5)
    decoded, batch = Decoded(monkeypatch), toy_batch(method.job)
    images: list[Any] = []
    method.parts.trained["network"].register_forward_hook(lambda _, x, z: images.append(z[0]))
    output = method.losses(batch, EARLY)
    weight = 0.5 * 0.6 * math.exp(-5 * 0.25)
    p, p_fused = images[0].softmax(1), decoded.calls[1][1][0].softmax(1)
    assert float(output.measures["consistency"]) == pytest.approx((p - p_fused).square().mean().item(), rel=1e-5)
    assert output.losses["consistency"].item() == pytest.approx(
        weight * float(output.measures["consistency"]), rel=1e-5
    )
    images[0].retain_grad()
    decoded.calls[1][1][0].retain_grad()
    output.losses["consistency"].backward()
    for z in (images[0], decoded.calls[1][1][0]):
        assert z.grad is not None
        assert (z.grad != 0).any(), "the gradient flows into both"


def test_consistency_closed_forms() -> None:
    method = trainer()
    z, sure = torch.zeros(2, 2, 4, 4), torch.tensor([60.0, -60.0]).view(1, 2, 1, 1).expand(2, 2, 4, 4)
    inside = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    assert method._consistency(z, z, inside, AT)["consistency"][1].item() == 0
    assert method._consistency(z, sure, inside, AT)["consistency"][1].item() == pytest.approx(0.25)
    inside[..., 2:] = False
    half = torch.where(inside, z, sure)
    assert method._consistency(z, half, inside, AT)["consistency"][1].item() == 0


# ---------------------------------------------------------------------------------------------------------- similarity


def test_terms_of_similarity_are_made_of_the_unlabeled_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed from the networks' outputs alone."""
    method = differing(trainer(lambda_prop=0.4, lambda_rel=0.2, tau=0.2), sure=20)
    batch = toy_batch(method.job)
    network, image = method.parts.trained["network"], unlabeled_image(batch)
    assert method.stage == 1, "16² voxels have 8² = 64 tokens at the second stage"
    e = method.parts.trained["projector"](encode(network, image)[1]).flatten(2).transpose(1, 2).reshape(128, 64)
    q = nn.functional.avg_pool2d(method.teacher.logits(image).softmax(1), 2).flatten(2).transpose(1, 2).reshape(128, 3)
    p = nn.functional.avg_pool2d(network(image)[0].softmax(1), 2).flatten(2).transpose(1, 2).reshape(128, 3)
    keys = (q.amax(1) >= 0.6).nonzero()[:, 0]
    assert 16 < len(keys) < 128
    monkeypatch.setattr(similarity, "KEYS_PER_CLASS", 128)
    output = method.losses(batch, AT)
    scores = (e @ e[keys].T / 0.2).masked_fill(torch.arange(128)[:, None] == keys, -math.inf)
    found = scores.softmax(1) @ q[keys]
    assert float(output.measures["key_share"]) == pytest.approx(len(keys) / 128)
    counted = (found.argmax(1) == q.argmax(1)) | (found.amax(1) >= 0.8)
    sharp = found**2 / (found**2).sum(1, keepdim=True)
    expected = -(sharp * p.log()).sum(1)[counted].mean()
    assert float(output.measures["propagation"]) == pytest.approx(expected.item(), rel=1e-3)
    assert float(output.measures["propagation_share"]) == pytest.approx(counted.float().mean().item())
    assert output.losses["propagation"].item() == pytest.approx(0.4 * expected.item(), rel=1e-3)
    assert float(output.measures["moved_share"]) == pytest.approx(
        (found.argmax(1) != q.argmax(1)).float().mean().item()
    )

    believed = q.amax(1) >= 0.8
    assert float(output.measures["believed_share"]) == pytest.approx(believed.float().mean().item())
    pairs = relation_pairs(q.argmax(1), believed, AT.generator("pairs"))
    agree = (1 + (e[pairs[:, 0]] * e[pairs[:, 1]]).sum(1)) / 2
    same = q.argmax(1)[pairs[:, 0]] == q.argmax(1)[pairs[:, 1]]
    relation = -torch.where(same, agree, 1 - agree).log().mean()
    assert output.losses["relation"].item() == pytest.approx(0.2 * relation.item(), rel=1e-3)
    assert float(output.measures["pairs"]) == len(pairs) > 1000


def test_gradients_go_where_they_belong() -> None:
    method = differing(trainer(), sure=20)
    output = method.losses(toy_batch(method.job), AT)
    network, projector = method.parts.trained["network"], method.parts.trained["projector"]
    reached = {}
    for name in ("propagation", "relation"):
        groups = {
            "encoder": list(network.encoder.parameters()),  # type: ignore[union-attr]
            "decoder": list(network.decoder.stages.parameters()),  # type: ignore[union-attr]
            "projector": list(projector.parameters()),
        }
        for group, parameters in groups.items():
            found = torch.autograd.grad(output.losses[name], parameters, retain_graph=True, allow_unused=True)
            if any(gradient is not None and bool((gradient != 0).any()) for gradient in found):
                reached.setdefault(name, set()).add(group)
    assert reached == {"propagation": {"encoder", "decoder"}, "relation": {"encoder", "projector"}}
    sum(output.losses.values()).backward()  # type: ignore[union-attr]
    assert all(weight.grad is None and not weight.requires_grad for weight in method.teacher.network.parameters())


def test_nothing_is_believed_of_an_unsure_teacher() -> None:
    method = trainer()
    for head in method.teacher.network.decoder.seg_layers:  # type: ignore[union-attr]
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    output = method.losses(toy_batch(method.job), AT)
    assert output.losses["relation"].item() == 0
    assert output.losses["relation"].requires_grad
    assert float(output.measures["pairs"]) == float(output.measures["believed_share"]) == 0
    assert float(output.measures["key_share"]) == 1, "where none is confident all may speak"


def test_an_all_background_teacher_relates_like_with_like() -> None:
    method = trainer()
    head = method.teacher.network.decoder.seg_layers[-1]  # type: ignore[union-attr,index]
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([60.0, 0, 0]))
    output = method.losses(toy_batch(method.job), AT)
    assert float(output.measures["alike_share"]) == 1
    assert float(output.measures["moved_share"]) == 0
    assert all(torch.isfinite(term) for term in output.losses.values())


@pytest.mark.parametrize("regions", [False, True])
def test_a_teacher_that_is_not_finite_makes_its_terms_so(regions: bool) -> None:
    method = trainer(toy_job(schema=toy_schema(regions=regions)))
    nn.init.constant_(method.teacher.network.decoder.seg_layers[-1].bias, math.nan)  # type: ignore[union-attr,index]
    losses = method.losses(toy_batch(method.job), AT).losses
    sound = {name for name, term in losses.items() if torch.isfinite(term)}
    assert sound == {"supervised", "supervised_mixed", "supervised_fused", "consistency"}


def test_voxels_outside_the_images_have_no_part() -> None:
    method = differing(trainer(), sure=20)
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    valid = torch.ones_like(batch.unlabeled.valid)
    valid[..., 8:] = False
    whole = method.losses(batch, AT)
    batch.unlabeled.valids = (valid,)
    half = method.losses(batch, AT)
    assert float(half.measures["pseudo_share"]) < float(whole.measures["pseudo_share"])
    assert float(half.measures["believed_share"]) <= 1
    for name in ("consistency", "propagation", "relation"):
        assert half.losses[name].item() != whole.losses[name].item()
    batch.unlabeled.valids = (torch.zeros_like(valid),)
    none = method.losses(batch, AT)
    for name in ("pseudo", "pseudo_fused", "propagation", "relation"):
        assert none.losses[name].item() == 0
        assert none.losses[name].requires_grad
    assert float(none.measures["propagation_share"]) == 0


@pytest.mark.parametrize(
    ("configuration", "stage"),
    [
        (toy_configuration(2), 1),
        (toy_configuration(2, patch_size=(32, 32)), 2),
        (toy_configuration(2, patch_size=(4, 4)), 0),
        (toy_configuration(3), 2),
        (ANISOTROPIC, 1),
    ],
)
def test_the_deep_stage_has_enough_tokens(configuration: Any, stage: int) -> None:
    assert deep_stage(configuration) == stage


# ------------------------------------------------------------------------------------------------ settings and warm-up


def test_each_part_can_be_switched_off() -> None:
    batch = toy_batch(toy_job())

    def terms(**settings: Any) -> set[str]:
        output: StepOutput = trainer(**settings).losses(batch, AT)
        return set(output.losses)

    full = {*EVERYTHING, *FSM}
    assert terms() == full
    assert terms(lambda_prop=0) == full - {"propagation"}
    assert terms(lambda_rel=0) == full - {"relation"}
    assert terms(lambda_cons=0) == full - {"consistency"}
    assert terms(lambda_features=0) == full - {"supervised_fused", "pseudo_fused"}
    assert terms(lambda_max=0) == full - {"consistency", *FSM}
    fusionless = terms(lambda_features=0, lambda_cons=0)
    assert fusionless == {"supervised", "supervised_mixed", "pseudo", *FSM}
    ablated = SimilarityFusion(toy_job(), make_settings(SimilarityFusion, dict(SimilarityFusion.ablation)))
    assert set(ablated.parts.trained) == {"network"}
    reference = trainer().losses(batch, AT).losses
    output = ablated.losses(batch, AT)
    assert set(output.losses) == set(EVERYTHING)
    assert all(term.item() == reference[name].item() for name, term in output.losses.items())


def test_weights_follow_the_ramp() -> None:
    for at, ramp in ((EARLY, math.exp(-5 * 0.25)), (AT, 1.0)):
        measures = trainer().losses(toy_batch(toy_job()), at).measures
        names = ("consistency", "propagation", "relation", "pseudo", "pseudo_fused")
        found = [float(measures[f"{name}_weight"]) for name in names]
        assert found == pytest.approx([ramp, 0.5 * ramp, 0.1 * ramp, 0.5, 0.25])


def test_until_the_warm_up_ends_the_step_is_the_twins() -> None:
    job = toy_job()
    batch, twin = toy_batch(job), Supervised(job, MethodSettings())
    method = trainer(job)
    output = method.losses(batch, WARM)
    assert list(output.losses) == ["supervised"]
    assert torch.equal(output.losses["supervised"], twin.losses(batch, WARM).losses["supervised"])
    assert [method.request(at).unlabeled.count for at in (WARM, replace(WARM, step=5))] == [0, 2]
    assert len(trainer(job, r_warm=0).losses(batch, WARM).losses) == 8


def test_the_projector_takes_steps_of_its_own() -> None:
    (phase,) = trainer().phases()
    assert phase.groups is not None
    network, projector = phase.groups
    assert network == ParameterGroup("network"), "as in the twin"
    assert (projector.prefix, projector.optimizer) == ("projector", "adamw")
    assert trainer(lambda_prop=0, lambda_rel=0).phases()[0].groups is None
    assert trainer(toy_job(n_unlabeled=0)).phases()[0].groups is None


def test_the_teacher_follows_from_the_first_step() -> None:
    method = trainer(ema_decay_max=0.75)
    student, teacher = method.parts.trained["network"], method.parts.followers["teacher"]
    old = [weight.clone() for weight in teacher.parameters()]
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(4.0)
    method.after_step(AT)
    for a, b in zip(old, teacher.parameters(), strict=True):
        assert torch.allclose(b, a + 0.25 * 4.0)


@pytest.mark.parametrize("counts", [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_any_batch_size_is_legal(counts: tuple[int, int]) -> None:
    method = trainer()
    output = method.losses(toy_batch(method.job, 0, *counts), AT)
    assert set(output.losses) == {*EVERYTHING, *FSM}
    sum(output.losses.values()).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("n_labeled", [2, 1])
def test_labeled_only_fuses_labeled_patches(n_labeled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = toy_job(n_unlabeled=0)
    batch = toy_batch(job, n_labeled=n_labeled, n_unlabeled=0)
    assert set(trainer(job).parts.trained) == {"network"}
    plain = trainer(job).losses(batch, AT).losses
    assert torch.equal(plain["supervised"], Supervised(job, MethodSettings()).losses(batch, AT).losses["supervised"])
    method, decoded = trainer(job, labeled_only=True), Decoded(monkeypatch)
    output = method.losses(batch, AT)
    assert set(output.losses) == {"supervised", "supervised_mixed", "supervised_fused", "consistency"}
    mask, y = method._mask(1, batch.labeled.image, AT), batch.labeled.target
    a, b = (
        (batch.labeled.image[:1], batch.labeled.image[1:])
        if n_labeled == 2
        else (i := batch.labeled.image, i.flip(2, 3))
    )
    target = torch.where(mask, y[:1], y[1:] if n_labeled == 2 else y.flip(2, 3))
    network = method.parts.trained["network"]
    z = network(torch.where(mask, a, b))
    expected = 0.5 * (hard_label_loss(z, target, mask) + hard_label_loss(z, target, ~mask))
    assert output.losses["supervised_mixed"].item() == pytest.approx(expected.item(), rel=1e-5)
    fused = decoded.calls[1][1][0]
    expected = 0.25 * (hard_label_loss(fused, target, mask) + hard_label_loss(fused, target, ~mask))
    assert output.losses["supervised_fused"].item() == pytest.approx(expected.item(), rel=1e-5)
    first = decoded.calls[1][0][0]
    assert torch.equal(first, torch.where(mask, encode(network, a)[0], encode(network, b)[0]))
    without = trainer(job, labeled_only=True, lambda_features=0, lambda_cons=0).losses(batch, AT).losses
    assert set(without) == {"supervised", "supervised_mixed"}


def test_the_projector_is_not_deployed(tmp_path: Path) -> None:
    method = trainer()
    spec = method.prediction()
    assert [member.parts for member in spec.members] == [("network",)]
    network, plan = method.parts.trained["network"], method.job.configuration
    window = Window.of(plan, mirror=False)
    predictor = Predictor.from_state_dicts(
        spec, [{"network": network.state_dict()}], plan, method.job.schema, window, "cpu"
    )
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        expected = network(image)[0]
    assert torch.allclose(torch.as_tensor(predictor.logits(image.numpy()))[:, 0], expected[0], atol=1e-2)
    assert method.alternative_predictions() == {"teacher": method.job.single_network_prediction("teacher")}
