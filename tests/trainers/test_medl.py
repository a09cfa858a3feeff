"""The checks of medl's specification: evidence and its fusion in closed form, the method through `losses()`."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from autossl.inference.predictor import Predictor, Window
from autossl.networks.build import residual_twin
from autossl.networks.prediction import probabilities_of
from autossl.planners.plans import NETWORK_CLASSES
from autossl.trainers.base import Batch, MethodSettings, Progress, StepOutput
from autossl.trainers.components.evidence import (
    Opinion,
    dirichlet,
    fisher_evidential,
    fuse_beliefs,
    log_fisher_determinant,
    rank_weight,
    reliability,
)
from autossl.trainers.components.losses import SupervisedLoss, hard_label_loss, one_hot, soft_dice
from autossl.trainers.methods.medl import MutualEvidential, MutualEvidentialSettings
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.registry import make_settings
from toys import toy_architecture, toy_batch, toy_configuration, toy_job, toy_schema

SUPERVISED = ["supervised_a", "supervised_b", "supervised_curriculum"]


def voxel(*values: float) -> Tensor:
    """[1, C, 1] in float64."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)


def opinion(belief: tuple[float, ...], uncertainty: float) -> Opinion:
    return Opinion(voxel(*belief), voxel(uncertainty))


def logit_of(evidence: float) -> float:
    """exp(logit) = evidence."""
    return math.log(evidence)


# -------------------------------------------------------------------------------------------------- evidence and fusion


def test_evidence_belief_and_uncertainty() -> None:
    z = torch.tensor([logit_of(2.0), logit_of(1.0), logit_of(3.0)]).view(1, 3, 1)
    found = dirichlet(z)
    assert found.alpha.flatten().tolist() == pytest.approx([3, 2, 4])
    assert found.log_p.exp().flatten().tolist() == pytest.approx([3 / 9, 2 / 9, 4 / 9])
    assert found.opinion.belief.flatten().tolist() == pytest.approx([2 / 9, 1 / 9, 3 / 9])
    assert found.opinion.uncertainty.item() == pytest.approx(3 / 9)
    torch.testing.assert_close(found.log_p.softmax(1), probabilities_of(z, "dirichlet"))
    extreme = dirichlet(torch.tensor([-1e4, 6e4]).view(1, 2, 1))
    assert all(torch.isfinite(part).all() for part in (*extreme, *extreme.opinion, extreme.log_p))


def test_much_evidence_for_the_wrong_class_is_taken_back() -> None:
    """The gradient on the wrong logit stays near 1, as that of a softmax does, however large the evidence is."""
    z = torch.tensor([-2.0, 6.0]).view(1, 2, 1).requires_grad_()
    (-dirichlet(z).log_p[0, 0]).sum().backward()
    assert z.grad is not None
    assert 0.9 < z.grad[0, 1].item() < 1


def test_fusion_closed_form() -> None:
    first, second = opinion((0.6, 0.2), 0.2), opinion((0.5, 0.1), 0.4)
    fused = fuse_beliefs(first, second)
    assert fused.belief.flatten().tolist() == pytest.approx([0.7561, 0.0976], abs=5e-5)
    assert fused.uncertainty.item() == pytest.approx(0.1463, abs=5e-5)
    assert reliability(fused).item() == pytest.approx(0.9116, abs=5e-5)
    for one, other in zip(fused, fuse_beliefs(second, first), strict=True):
        assert torch.equal(one, other), "symmetric"


def test_fusion_keeps_what_must_be_kept() -> None:
    draw = torch.distributions.Dirichlet(torch.ones(5))
    torch.manual_seed(0)
    b_1, b_2 = (draw.sample((2, 8)).movedim(-1, 1) for _ in range(2))
    first, second = (Opinion(b[:, :4], b[:, 4:]) for b in (b_1, b_2))
    fused = fuse_beliefs(first, second)
    total = fused.belief.sum(1, keepdim=True) + fused.uncertainty
    assert (total - 1).abs().max() < 1e-6
    ignorant = Opinion(torch.zeros(2, 4, 8), torch.ones(2, 1, 8))
    assert torch.equal(fuse_beliefs(first, ignorant).belief.argmax(1), first.belief.argmax(1))
    classes = [
        float(fuse_beliefs(opinion((0.5, *[0.0] * n), 0.5), opinion((0.5, *[0.0] * n), 0.5)).uncertainty)
        for n in (1, 9)
    ]
    b, u = 0.25, 0.25
    assert classes == pytest.approx([u / (b + u + 0.5 / (1 + n)) for n in (2, 10)]), "the discount is 1 / (1 + C)"


def test_without_discount_it_is_dempsters_rule() -> None:
    first, second = opinion((0.4, 0.2, 0.1), 0.3), opinion((0.1, 0.3, 0.2), 0.4)
    focal = [frozenset({0}), frozenset({1}), frozenset({2}), frozenset({0, 1, 2})]
    masses = [dict(zip(focal, torch.cat(list(entry), 1).flatten().tolist(), strict=True)) for entry in (first, second)]
    joint = dict.fromkeys(focal, 0.0)
    conflict = 0.0
    for (a, m_a), (b, m_b) in itertools.product(masses[0].items(), masses[1].items()):
        if a & b:
            joint[a & b] += m_a * m_b
        else:
            conflict += m_a * m_b
    fused = fuse_beliefs(first, second, discount=1.0)
    expected = [mass / (1 - conflict) for mass in joint.values()]
    assert torch.cat(list(fused), 1).flatten().tolist() == pytest.approx(expected)


def test_nothing_is_relied_on_where_nothing_is_believed() -> None:
    conflict = fuse_beliefs(opinion((1.0, 0.0), 0.0), opinion((0.0, 1.0), 0.0))
    ignorance = fuse_beliefs(opinion((0.0, 0.0), 1.0), opinion((0.0, 0.0), 1.0))
    for fused in (conflict, ignorance):
        assert fused.belief.flatten().tolist() == [0, 0]
        assert fused.uncertainty.item() == 1
        assert reliability(fused).item() == 0, "the formula alone would give 1"
    assert reliability(opinion((1.0, 0.0), 0.0)).item() == 1
    assert reliability(opinion((0.5, 0.5), 0.0)).item() == 1, "divided, but sure of it: as published"
    assert reliability(opinion((0.25, 0.25), 0.5)).item() == pytest.approx(math.exp(-0.5))
    assert torch.isnan(reliability(opinion((math.nan, 0.5), 0.5))).all(), "what is not finite stays so"
    assert torch.isnan(fuse_beliefs(opinion((math.nan, 0.5), 0.5), opinion((0.5, 0.0), 0.5)).belief).any()


# --------------------------------------------------------------------------------------------------------- Fisher loss


@pytest.mark.parametrize(
    "alpha, true, expected",
    [((1, 1), 0, 1.09662), ((3, 1), 0, 0.20399), ((3, 1), 1, 1.22392), ((1, 1, 1), 0, 1.37078)],
)
def test_fisher_loss_values(alpha: tuple[float, ...], true: int, expected: float) -> None:
    onehot = voxel(*(float(index == true) for index in range(len(alpha))))
    assert fisher_evidential(voxel(*alpha), onehot, 0.0).item() == pytest.approx(expected, abs=5e-6)
    log_det = log_fisher_determinant(torch.special.polygamma(1, voxel(*alpha)), voxel(sum(alpha))).item()
    with_information = fisher_evidential(voxel(*alpha), onehot, 0.1).item()
    assert with_information == pytest.approx(expected - 0.1 * log_det, abs=5e-6)


@pytest.mark.parametrize("alpha, expected", [((1, 1), 0.584060), ((3, 1), 0.0706791), ((1, 1, 1), 1.2450285)])
def test_determinant_of_the_fisher_matrix(alpha: tuple[float, ...], expected: float) -> None:
    trigamma = torch.special.polygamma(1, voxel(*alpha))
    found = log_fisher_determinant(trigamma, voxel(sum(alpha))).exp().item()
    assert found == pytest.approx(expected, abs=1e-6)
    matrix = torch.diag(trigamma.flatten()) - torch.special.polygamma(1, voxel(sum(alpha))).item()
    assert found == pytest.approx(torch.linalg.det(matrix).item())


def test_the_determinant_stays_finite_for_much_evidence() -> None:
    alpha = torch.full((1, 20, 1), 1e9, requires_grad=True)
    loss = fisher_evidential(alpha, one_hot(torch.zeros(1, 1, 1, dtype=torch.long), 20), 0.1)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert alpha.grad is not None
    assert torch.isfinite(alpha.grad).all()


@pytest.mark.parametrize("information", [0.0, 1e-3, 0.1])
def test_fisher_gradient_against_finite_differences(information: float) -> None:
    alpha = 1 + 5 * torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8).view(2, 1, 4) % 3
    onehot = one_hot(labels, 3).double()
    alpha.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda a: fisher_evidential(a, onehot, information), (alpha,), rtol=1e-4)


@pytest.mark.parametrize("information, expected", [(0.0, -1.7152), (1e-3, -1.7134), (0.1, -1.5312), (1.0, 0.1247)])
def test_evidence_for_the_true_class_pays(information: float, expected: float) -> None:
    alpha = voxel(1, 1).requires_grad_(True)
    fisher_evidential(alpha, voxel(1, 0), information).sum().backward()
    assert alpha.grad is not None
    assert alpha.grad[0, 0, 0].item() == pytest.approx(expected, abs=5e-5)


def test_a_weight_of_ln_i_that_turns_the_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="information_weight"):
        MutualEvidentialSettings(information_weight=1.0)


# ---------------------------------------------------------------------------------------------------------- curriculum


def test_curriculum_goes_from_certain_to_uncertain() -> None:
    u = torch.rand(2, 1, 40, 50, generator=torch.Generator().manual_seed(1))
    u[1] *= 0.01  # another scale: ranks are of a patch
    everywhere = torch.ones_like(u, dtype=torch.bool)
    begin, middle, end = (rank_weight(u, r, 0.5, everywhere) for r in (0.0, 0.5, 1.0))
    assert torch.equal(middle, torch.ones_like(u))
    for sample in range(2):
        least, most = u[sample].flatten().argmin(), u[sample].flatten().argmax()
        assert begin[sample].flatten()[least].item() == pytest.approx(1.3808, abs=5e-4)
        assert begin[sample].flatten()[most].item() == pytest.approx(0.6192, abs=5e-4)
    torch.testing.assert_close(begin + end, torch.full_like(u, 2), msg="mirrored")
    assert (begin.mean((1, 2, 3)) - 1).abs().max() < 1e-3
    order = u[0].flatten().argsort()
    assert (begin[0].flatten()[order].diff() <= 0).all()
    assert torch.equal(rank_weight(u, 0.0, 0.0, everywhere), torch.ones_like(u))


def test_ties_share_their_rank_and_invalid_voxels_have_none() -> None:
    u = torch.tensor([0.1, 0.1, 0.5, 0.9, 7.0]).view(1, 1, 5)
    valid = torch.tensor([True, True, True, True, False]).view(1, 1, 5)
    found = rank_weight(u, 1.0, 1.0, valid).flatten()
    psi = torch.tensor([-0.5, -0.5, 0.25, 0.75])
    torch.testing.assert_close(found[:4], 1 + psi.tanh())
    assert found[4] == 0
    assert rank_weight(torch.full((1, 1, 7), 0.3), 0.0, 0.5, torch.ones(1, 1, 7, dtype=torch.bool)).tolist() == [
        [[1.0] * 7]
    ]
    assert not rank_weight(u, 0.0, 0.5, torch.zeros_like(valid)).any()


# ------------------------------------------------------------------------------------------------------------ the step


def trainer(n_unlabeled: int = 4, job: dict[str, Any] | None = None, **settings: Any) -> MutualEvidential:
    return MutualEvidential(toy_job(n_unlabeled=n_unlabeled, **(job or {})), MutualEvidentialSettings(**settings))


def network(method: MutualEvidential, key: str) -> Any:
    return method.parts.trained[f"network_{key}"]


def say(module: Any, evidence: tuple[float, ...]) -> None:
    """The same evidence for each class everywhere."""
    for layer in module.decoder.seg_layers:
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor([logit_of(value) for value in evidence])


def step(method: MutualEvidential, fraction: float = 1.0, batch: Batch | None = None) -> StepOutput:
    return method.losses(batch or toy_batch(method.job), Progress(step=round(1000 * fraction), total=1000))


def total(output: StepOutput) -> Tensor:
    return torch.stack(list(output.losses.values())).sum()


def gradients(method: MutualEvidential) -> list[Tensor]:
    return [
        torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for part in method.parts.trained.values()
        for p in part.parameters()
    ]


A, B = (3.0, 1.0, 0.5), (0.5, 0.8, 0.25)


def fused_of(a: tuple[float, ...], b: tuple[float, ...], discount: float | None = None) -> Opinion:
    def of(evidence: tuple[float, ...]) -> Opinion:
        strength = sum(evidence) + len(evidence)
        return opinion(tuple(v / strength for v in evidence), len(evidence) / strength)

    return fuse_beliefs(of(a), of(b), discount)


def test_terms_of_constant_networks_closed_form() -> None:
    method = trainer(lambda_max=1.0)
    say(network(method, "a"), A)
    say(network(method, "b"), B)
    output = step(method)
    assert list(output.losses) == [*SUPERVISED, "pseudo", "fisher"]
    fused = fused_of(A, B)
    true = int(fused.belief.argmax())
    assert true == 0
    pseudo = fisher = 0.0
    for evidence in (A, B):
        alpha = [v + 1 for v in evidence]
        p = [value / sum(alpha) for value in alpha]
        # the labels are background everywhere: both classes of the Dice are absent and predicted
        pseudo += -math.log(p[true]) + 1 - 0.0
        fisher += fisher_evidential(voxel(*alpha), voxel(1, 0, 0), 1e-3).item()
    assert output.losses["pseudo"].item() == pytest.approx(pseudo, rel=1e-4)
    assert output.losses["fisher"].item() == pytest.approx(fisher, rel=1e-4)
    measures = {key: float(value) for key, value in output.measures.items()}
    assert measures["reliability"] == pytest.approx(reliability(fused).item(), rel=1e-5)
    assert measures["uncertainty_unlabeled"] == pytest.approx(fused.uncertainty.item(), rel=1e-5)
    assert measures["disagreement"] == measures["pseudo_share"] == measures["fisher_share"] == 1
    assert measures["pseudo_foreground_share"] == 0


def test_supervised_terms_are_those_of_the_expected_probabilities() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    output = step(method, 0.5, batch)
    y = batch.labeled.target
    for key in "ab":
        levels = network(method, key)(batch.labeled.image)
        p = probabilities_of(levels[0], "dirichlet")
        nll = -p.gather(1, y).log().mean()
        dice = 1 - soft_dice(p, y, classes=[1, 2], per_sample=True).mean()
        assert len(levels) == 2, "of which the lower has weight 0"
        assert output.losses[f"supervised_{key}"].item() == pytest.approx((nll + dice).item(), rel=1e-5)


def test_all_levels_are_supervised() -> None:
    configuration = toy_configuration(2, architecture=toy_architecture(2, (4, 8, 8, 8)))
    method = trainer(job={"configuration": configuration})
    batch = toy_batch(method.job)
    found = step(method, 0.5, batch).losses["supervised_a"]
    levels = [probabilities_of(z, "dirichlet").log() for z in network(method, "a")(batch.labeled.image)]
    loss = SupervisedLoss(regions=False, batch_dice=False, has_ignore=False)
    assert len(levels) == 3
    assert found.item() == pytest.approx(loss(levels, batch.labeled.target, batch.labeled.valid).item(), rel=1e-5)
    found.backward()
    assert network(method, "a").decoder.seg_layers[1].bias.grad.any(), "the second level learns"


def by_hand(method: MutualEvidential, batch: Batch, fraction: float) -> dict[str, Tensor]:
    """The special terms as the specification writes them, with all that is constant detached."""
    assert batch.unlabeled is not None
    x, y = torch.cat([batch.labeled.image, batch.unlabeled.image]), batch.labeled.target
    n = len(y)
    e = {key: dirichlet(network(method, key)(x)[0]) for key in "ab"}
    own = {key: found.opinion for key, found in e.items()}
    fused = Opinion(*(part.detach() for part in fuse_beliefs(own["a"], own["b"])))
    labels, w = fused.belief[n:].argmax(1, keepdim=True), reliability(fused)[n:]
    everywhere = torch.ones_like(batch.unlabeled.valid)
    omega = rank_weight(fused.uncertainty[n:], fraction, 0.5, everywhere)
    curriculum, pseudo, fisher = [], [], []
    for key in "ab":
        u = 0.5 * own[key].uncertainty.detach()[:n] + 0.5 * fused.uncertainty[:n]
        omega_l = rank_weight(u, fraction, 0.5, everywhere)
        curriculum.append(-(omega_l * e[key].log_p[:n].gather(1, y)).mean())
        pseudo.append(hard_label_loss(e[key].log_p[n:], labels, w))
        fisher.append((omega * fisher_evidential(e[key].alpha[n:], one_hot(labels, 3), 1e-3)).mean())
    terms = {"supervised_curriculum": curriculum, "pseudo": pseudo, "fisher": fisher}
    return {key: torch.stack(values).sum() for key, values in terms.items()}


@pytest.mark.parametrize("name", ["supervised_curriculum", "pseudo", "fisher"])
@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_every_special_term_and_its_gradient(name: str, fraction: float) -> None:
    """Labels, reliability, ranks and fused beliefs are constants, so the gradients agree as well."""
    method, reference = trainer(lambda_max=1.0, ramp_end=0.0), trainer()
    batch = toy_batch(method.job)
    found, expected = step(method, fraction, batch).losses[name], by_hand(reference, batch, fraction)[name]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    expected.backward()
    for mine, theirs in zip(gradients(method), gradients(reference), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_terms_teach_both_networks() -> None:
    for name in ("pseudo", "fisher", "supervised_curriculum"):
        method = trainer()
        step(method).losses[name].backward()
        for part in method.parts.trained.values():
            assert any(p.grad is not None and p.grad.any() for p in part.parameters()), name


def test_ramp_and_warm_up() -> None:
    method = trainer()
    assert list(step(method, 0.019).losses) == SUPERVISED
    weights = [float(step(method, r).measures["fisher_weight"]) for r in (0.02, 0.5, 1.0)]
    assert weights == pytest.approx([0.1 * math.exp(-5 * 0.98**2), 0.1 * 0.2865048, 0.1], rel=1e-5)
    assert list(step(trainer(r_warm=0.3), 0.29).losses) == SUPERVISED
    assert "fisher" in step(trainer(r_warm=0.3), 0.3).losses
    faithful = step(trainer(faithful=True), 0.5)
    assert float(faithful.measures["pseudo_weight"]) == 1
    assert float(faithful.measures["fisher_weight"]) == pytest.approx(0.02865, rel=1e-3)
    assert list(step(trainer(faithful=True), 0.01).losses) == SUPERVISED


def test_ablation_leaves_two_networks_that_teach_by_their_mean() -> None:
    method, batch = trainer(), toy_batch(toy_job())
    settings = make_settings(MutualEvidential, dict(MutualEvidential.ablation))
    ablated = MutualEvidential(toy_job(), settings)
    assert settings.fusion == "mean"
    full, less = (step(one, 0.1, batch) for one in (method, ablated))
    assert set(full.losses) - set(less.losses) == {"fisher"}
    assert full.losses["fisher"].item() > 0
    assert all(full.losses[name].item() == less.losses[name].item() for name in ("supervised_a", "supervised_b"))
    assert float(less.measures["curriculum_spread"]) == 0
    assert float(full.measures["reliability"]) != float(less.measures["reliability"])


def test_the_curriculum_can_be_switched_off() -> None:
    batch = toy_batch(toy_job())
    on, off = (step(trainer(xi=xi), 0.1, batch) for xi in (0.5, 0.0))
    assert float(on.measures["curriculum_spread"]) > 0.05
    assert float(off.measures["curriculum_spread"]) == 0
    method = trainer()
    plain = sum(
        -dirichlet(network(method, k)(batch.labeled.image)[0]).log_p.gather(1, batch.labeled.target).mean().item()
        for k in "ab"
    )
    assert off.losses["supervised_curriculum"].item() == pytest.approx(plain, rel=1e-5)
    assert on.losses["fisher"].item() != off.losses["fisher"].item()


@pytest.mark.parametrize("fusion", ["caef", "ef", "mean"])
def test_fusion_can_be_chosen(fusion: str) -> None:
    method = trainer(fusion=fusion)
    say(network(method, "a"), A)
    say(network(method, "b"), B)
    if fusion == "mean":
        first, second = fused_of(A, (0.0,) * 3, 1.0), fused_of((0.0,) * 3, B, 1.0)
        expected = Opinion(*((one + other) / 2 for one, other in zip(first, second, strict=True)))
    else:
        expected = fused_of(A, B, 1.0 if fusion == "ef" else None)
    measures = step(method).measures
    assert float(measures["uncertainty_unlabeled"]) == pytest.approx(expected.uncertainty.item(), rel=1e-5)
    assert float(measures["reliability"]) == pytest.approx(reliability(expected).item(), rel=1e-5)


def test_reliability_can_weigh_the_fisher_term() -> None:
    plain, masked = trainer(), trainer(mask_fisher=True)
    for method in (plain, masked):
        say(network(method, "a"), A)
        say(network(method, "b"), B)
    w = reliability(fused_of(A, B)).item()
    assert w < 0.9
    assert step(masked).losses["fisher"].item() == pytest.approx(w * step(plain).losses["fisher"].item(), rel=1e-5)
    assert float(step(masked).measures["pseudo"]) == pytest.approx(float(step(plain).measures["pseudo"]), rel=1e-5)


def test_own_share_ranks_labeled_voxels() -> None:
    batch = toy_batch(toy_job())
    values = {share: step(trainer(own_share=share), 0.1, batch).losses for share in (0.0, 0.5, 1.0)}
    assert len({losses["supervised_curriculum"].item() for losses in values.values()}) == 3
    assert len({losses["fisher"].item() for losses in values.values()}) == 1


# ----------------------------------------------------------------------------------------------------------- odd input


def test_invalid_voxels_do_not_act() -> None:
    method = trainer(job={"schema": toy_schema(ignore=True)})
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    keep = torch.ones_like(batch.labeled.valid)
    keep[..., 10:] = False
    batch.labeled.valids = batch.unlabeled.valids = (keep,)
    first = step(method, 0.2, batch)
    batch.labeled.targets = (torch.where(keep, batch.labeled.target, 1),)
    second = step(method, 0.2, batch)
    assert {k: v.item() for k, v in first.losses.items()} == {k: v.item() for k, v in second.losses.items()}
    assert float(first.measures["fisher_share"]) == pytest.approx(10 / 16)
    spoiled = toy_batch(method.job)
    assert spoiled.unlabeled is not None
    spoiled.labeled.valids = spoiled.unlabeled.valids = (torch.zeros_like(keep),)
    nothing = step(method, 0.2, spoiled)
    assert all(term.item() == 0 and term.requires_grad for term in nothing.losses.values())
    total(nothing).backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(method))
    assert all(math.isfinite(float(value)) for value in nothing.measures.values())


def test_only_valid_voxels_are_averaged() -> None:
    """Constant networks: half of the voxels cost on average what all of them do."""
    method = trainer()
    say(network(method, "a"), A)
    say(network(method, "b"), B)
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    whole = step(method, 0.2, batch).losses
    half = torch.ones_like(batch.unlabeled.valid)
    half[..., 8:] = False
    batch.unlabeled.valids = (half,)
    part = step(method, 0.2, batch).losses
    assert part["fisher"].item() == pytest.approx(whole["fisher"].item(), rel=1e-5)
    assert part["pseudo"].item() == pytest.approx(whole["pseudo"].item(), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["a", "b"])
def test_a_network_that_is_not_finite_labels_nothing(key: str, value: float) -> None:
    method = trainer()

    def spoil(module: Any, given: Any, answered: Tensor) -> Tensor:
        spoiled = answered.clone()
        spoiled[-1, 1] = value
        return spoiled

    network(method, key).decoder.seg_layers[-1].register_forward_hook(spoil)
    losses = step(method).losses
    bad = {name for name, term in losses.items() if not torch.isfinite(term)}
    assert bad == {"pseudo", "fisher"}, "the last row is unlabeled"


def test_without_unlabeled_cases_it_is_the_twin_or_two_evidential_networks() -> None:
    batch = toy_batch(toy_job(), n_unlabeled=0)
    alone = trainer(n_unlabeled=0)
    twin = Supervised(toy_job(n_unlabeled=0), MethodSettings())
    expected, found = twin.losses(batch, Progress(50, 100)).losses, step(alone, batch=batch).losses
    assert list(found) == list(expected)
    assert torch.equal(found["supervised"], expected["supervised"])
    assert alone.prediction().activation == "softmax"
    assert alone.alternative_predictions() == {}
    pair = trainer(n_unlabeled=0, labeled_only=True)
    output = step(pair, 0.1, batch)
    assert list(output.losses) == SUPERVISED
    assert float(output.measures["curriculum_spread"]) > 0, "the curriculum needs no unlabeled data"
    assert pair.prediction().activation == "dirichlet"


# ---------------------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("residual_plan", [False, True])
def test_the_networks_have_different_architectures(residual_plan: bool) -> None:
    own = toy_architecture(2, (4, 8, 8))
    configuration = toy_configuration(2, architecture=residual_twin(own) if residual_plan else own)
    method = trainer(job={"configuration": configuration})
    members = method.prediction().members
    names = [member.architecture.network_class_name for member in members]
    assert set(names) == set(NETWORK_CLASSES.values())
    assert members[0].architecture == configuration.architecture, "the plan's own comes first"
    kinds = [type(network(method, key)).__name__ for key in "ab"]
    assert kinds == [name.rsplit(".", 1)[1] for name in names]


def test_what_predicts_is_the_mean_of_alpha_over_its_sum() -> None:
    method = trainer()
    spec, plan = method.prediction(), method.job.configuration
    assert (spec.activation, spec.combine) == ("dirichlet", "mean_probabilities")
    assert list(method.alternative_predictions()) == ["network_a", "network_b"]
    image = torch.randn(1, 1, 16, 16)
    states = {name: module.state_dict() for name, module in method.parts.trained.items()}
    window = Window.of(plan, mirror=False)
    predictor = Predictor.from_state_dicts(spec, [states], plan, method.job.schema, window, "cpu")
    logits = predictor.logits(image.numpy())
    with torch.no_grad():
        p = [probabilities_of(network(method, key)(image)[0], "dirichlet")[0] for key in "ab"]
    torch.testing.assert_close(
        probabilities_of(logits[:, 0], spec.output_activation, dim=0), (p[0] + p[1]) / 2, rtol=1e-4, atol=1e-5
    )


def test_regions_are_not_taken() -> None:
    assert MutualEvidential.needs.softmax_only, "asked for before any work"
    assert MutualEvidential.needs.networks == 2


def test_single_patches_and_volumes() -> None:
    for dims in (2, 3):
        method = MutualEvidential(toy_job(dims), MutualEvidentialSettings())
        batch = toy_batch(method.job, n_labeled=1, n_unlabeled=1)
        output = method.losses(batch, Progress(50, 100))
        total(output).backward()
        assert all(torch.isfinite(gradient).all() for gradient in gradients(method))
