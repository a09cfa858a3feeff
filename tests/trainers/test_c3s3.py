"""The checks of c3s3's specification: the outcome contrast in closed form, the method through `losses()`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from autossl.networks.build import residual_twin
from autossl.networks.features import forward_features
from autossl.planners.plans import NETWORK_CLASSES
from autossl.trainers.base import Batch, Job, MethodSettings, Progress, StepOutput
from autossl.trainers.components.contrast import rows_at
from autossl.trainers.components.losses import masked_ce, probability_mse, soft_dice
from autossl.trainers.components.outcome_contrast import claims, contrast_voxels, drawn_classes, iuc_loss
from autossl.trainers.components.pseudo import sharpen
from autossl.trainers.methods.c3s3 import CompetitiveContrast, CompetitiveContrastSettings
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.registry import make_settings
from toys import toy_architecture, toy_configuration, toy_job, toy_schema, toy_stream

SUPERVISED = ["supervised_a", "supervised_b"]
SPECIAL = ["consistency", "contrast", "competition"]


# ------------------------------------------------------------------------------------------------- the outcome contrast


def pairs_with(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows whose products are given."""
    e_a = torch.stack([similarity, (1 - similarity**2).clamp(min=0).sqrt()], 1)
    return e_a, torch.tensor([[1.0, 0.0]]).expand_as(e_a)


def mask(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)[:, None]


def one_term(s: Tensor, chosen: Tensor, tau: float = 0.1) -> Tensor:
    """As it is written: -ln(e^(m·s/τ) / (Σ e^((1-m)·s/τ) + e^(m·s/τ)))."""
    s, m = s.double(), chosen.double()
    own = torch.exp(m * s / tau)
    return -torch.log(own / (torch.exp((1 - m) * s / tau).sum() + own)).mean()


def test_contrast_closed_form() -> None:
    s = torch.tensor([0.9, 0.8, 0.1, 0.5])
    both, any_of = mask(1, 0, 0, 0), mask(1, 1, 0, 0)
    expected = [one_term(s, both[:, 0]).item(), one_term(s, ~any_of[:, 0]).item()]
    assert expected == pytest.approx([6.1193, 7.8169], abs=1e-4)
    e_a, e_b = pairs_with(s)
    assert iuc_loss(e_a, e_b, both, any_of).item() == pytest.approx(sum(expected), rel=1e-6)
    assert iuc_loss(e_a, e_b, any_of, both).item() == pytest.approx(sum(expected), rel=1e-6), "whoever claims it"
    softer = one_term(s, both[:, 0], 0.5) + one_term(s, ~any_of[:, 0], 0.5)
    assert iuc_loss(e_a, e_b, both, any_of, tau=0.5).item() == pytest.approx(softer.item(), rel=1e-6)
    with pytest.raises(ValueError, match="tau is 0"):
        iuc_loss(e_a, e_b, both, any_of, tau=0)


def test_orthogonal_embeddings_cost_ln_n_plus_1_twice() -> None:
    e_a, e_b = pairs_with(torch.zeros(7))
    found = iuc_loss(e_a, e_b, mask(1, 0, 1, 0, 0, 0, 0), mask(1, 1, 0, 0, 0, 0, 1))
    assert found.item() == pytest.approx(2 * math.log(8), rel=1e-6)


def test_similarity_is_pushed_down_where_one_network_alone_claims() -> None:
    s = torch.tensor([0.9, 0.8, 0.1, 0.5], requires_grad=True)
    both, any_of = torch.tensor([True, False, False, False]), torch.tensor([True, True, False, False])
    for chosen in (both, ~any_of):
        (gradient,) = torch.autograd.grad(one_term(s, chosen), s)
        assert gradient[1] > 0, "disagreement: more similarity costs more in both terms"
    e_b = torch.eye(2)[[0, 0, 0, 0]]
    e_a = pairs_with(s.detach())[0].requires_grad_(True)
    iuc_loss(e_a, e_b, both[:, None], any_of[:, None]).backward()
    assert e_a.grad is not None
    along = (e_a.grad * e_b).sum(1)
    assert along[1] > 0
    assert along[1] == along.max()


def test_classes_that_nobody_claims_are_left_out() -> None:
    e_a, e_b = pairs_with(torch.tensor([0.9, 0.8, 0.1, 0.5]))
    one = [(mask(1, 0, 0, 0), mask(1, 1, 0, 0)), (mask(0, 0, 0, 1), mask(0, 0, 1, 1))]
    nobody = mask(0, 0, 0, 0)
    alone = [iuc_loss(e_a, e_b, a, b).item() for a, b in one]
    together = iuc_loss(e_a, e_b, *(torch.cat([one[0][k], nobody, one[1][k]], 1) for k in (0, 1)))
    assert together.item() == pytest.approx(sum(alone) / 2, rel=1e-6)
    e_a.requires_grad_(True)
    nothing = iuc_loss(e_a, e_b, nobody, nobody)
    nothing.backward()
    assert nothing.item() == 0
    assert e_a.grad is not None
    assert not e_a.grad.any()


def scene() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings and decisions of two networks that disagree around a disk; 2·40·40 voxels."""
    generator = torch.Generator().manual_seed(3)
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    radius = ((y - 20) ** 2 + (x - 20) ** 2).sqrt()
    a, b = (radius < 9).expand(2, 1, 40, 40), (radius < 11).expand(2, 1, 40, 40)
    e = [torch.nn.functional.normalize(torch.randn(2, 4, 40, 40, generator=generator) + 0.7, dim=1) for _ in "ab"]
    return e[0], e[1], a, b


def sampled(n: int, seed: int) -> float:
    e_a, e_b, a, b = scene()
    everywhere = torch.ones_like(a)
    positions, scale = contrast_voxels(a | b, everywhere, n, (1.0, 1.0), torch.Generator().manual_seed(seed))
    assert len(positions) == n == len(positions.unique())
    assert scale.sum().item() == pytest.approx(3200, rel=1e-5), "each stands for others of its stratum"
    return iuc_loss(*(rows_at(values, positions) for values in (e_a, e_b, a, b)), scale=scale).item()


def test_sampled_contrast_stands_for_all_voxels() -> None:
    e_a, e_b, a, b = scene()
    dense = iuc_loss(*(values.movedim(1, -1).flatten(0, -2) for values in (e_a, e_b, a, b))).item()
    assert sampled(3200, 0) == pytest.approx(dense, rel=1e-5)
    draws = [sampled(1600, seed) for seed in range(200)]
    assert sum(draws) / 200 == pytest.approx(dense, rel=0.02)
    assert min(draws) != max(draws)


def test_half_of_the_voxels_lies_in_and_around_the_foreground() -> None:
    foreground = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    foreground[..., 10:14, 10:14] = True
    counted = torch.ones_like(foreground)
    counted[..., 30:, :] = False
    positions, scale = contrast_voxels(foreground, counted, 40, (1.0, 1.0), torch.Generator().manual_seed(0))
    y, x = positions // 32, positions % 32
    distance = torch.stack([(10 - v).clamp(min=0) + (v - 13).clamp(min=0) for v in (y, x)]).float().norm(dim=0)
    assert (distance <= 2).sum() == 20
    assert (y < 30).all()
    n_near = 16 + 4 * 8 + 4  # the square, two rows on each side, and the diagonal voxels
    assert sorted(set(scale.tolist())) == pytest.approx([n_near / 20, (30 * 32 - n_near) / 20])
    many, alone = contrast_voxels(foreground, counted, 5000, (1.0, 1.0), torch.Generator().manual_seed(0))
    assert len(many) == 30 * 32
    assert (alone == 1).all()
    filled, _ = contrast_voxels(foreground, counted, 400, (1.0, 1.0), torch.Generator().manual_seed(0))
    assert len(filled) == 400, "the rest fills up"
    none, _ = contrast_voxels(foreground, torch.zeros_like(counted), 40, (1.0, 1.0), torch.Generator().manual_seed(0))
    assert len(none) == 0


def test_claims_and_the_classes_that_are_drawn() -> None:
    z = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0], [-1.0, 2.0, 1.0]]).T.view(1, 3, 3)
    assert claims(z).tolist() == [[[False, False, True], [True, False, False]]]
    assert claims(z, regions=True).tolist() == (z > 0).tolist()
    assert drawn_classes(torch.tensor([True, False, True]), torch.Generator()).tolist() == [0, 2]
    some = drawn_classes(torch.ones(20, dtype=torch.bool), torch.Generator().manual_seed(1))
    assert len(some) == 8 == len(set(some.tolist()))


# ------------------------------------------------------------------------------------------------------------ the step


RELEASED: dict[str, Any] = {"lambda_max": 0.1, "ramp_end": 2.4, "lambda_iuc": 2.0, "r_warm": None}
"""Weights and warm-up of the released code and the specification; the defaults are ours."""


def trainer(n_unlabeled: int = 4, job: dict[str, Any] | None = None, **settings: Any) -> CompetitiveContrast:
    return CompetitiveContrast(toy_job(n_unlabeled=n_unlabeled, **(job or {})), CompetitiveContrastSettings(**settings))


def batch_of(job: Job, n_labeled: int = 2, n_unlabeled: int = 2, same_views: bool = False) -> Batch:
    unlabeled = toy_stream(job, n_unlabeled, 0, labeled=False, views=2) if n_unlabeled else None
    batch = Batch(toy_stream(job, n_labeled, 0, labeled=True, views=2), unlabeled)
    for stream in (batch.labeled, batch.unlabeled):
        if same_views and stream is not None:
            stream.views = (stream.views[0],) * 2
    return batch


def network(method: CompetitiveContrast, key: str) -> Any:
    return method.parts.trained[f"network_{key}"]


def say(module: Any, logits: tuple[float, ...]) -> None:
    """The same logits everywhere."""
    for layer in module.decoder.seg_layers:
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor(logits)


def step(method: CompetitiveContrast, fraction: float = 1.0, batch: Batch | None = None) -> StepOutput:
    return method.losses(batch or batch_of(method.job), Progress(step=round(1000 * fraction), total=1000))


def total(output: StepOutput) -> Tensor:
    return torch.stack(list(output.losses.values())).sum()


def reached(method: CompetitiveContrast) -> set[str]:
    """Parts that have a gradient."""
    return {
        name
        for name, part in method.parts.trained.items()
        if any(p.grad is not None and p.grad.any() for p in part.parameters())
    }


def logits_of(method: CompetitiveContrast, batch: Batch) -> dict[str, list[Tensor]]:
    """Per network and view, labeled patches first."""
    assert batch.unlabeled is not None
    images = [torch.cat([batch.labeled.views[v], batch.unlabeled.views[v]]) for v in (0, 1)]
    return {key: [network(method, key)(image)[0] for image in images] for key in "ab"}


def test_the_terms_of_a_step_by_hand() -> None:
    method = trainer(**RELEASED)
    batch = batch_of(method.job)
    output = step(method, 1.0, batch)
    assert list(output.losses) == [*SUPERVISED, *SPECIAL]
    z, y, valid = logits_of(method, batch), batch.labeled.target, batch.labeled.valid
    for key in "ab":
        views = [network(method, key)(view) for view in batch.labeled.views]
        expected = torch.stack([method.job.supervised_loss(levels, y, valid) for levels in views]).mean()
        assert output.losses[f"supervised_{key}"].item() == pytest.approx(expected.item(), rel=1e-5)
    cosine = sum((1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean().item() for a, b in (z["a"], z["b"]))
    assert output.losses["consistency"].item() == pytest.approx(cosine, rel=1e-4)
    scores = {
        key: sum(
            0.5 * masked_ce(view[:2], y).item()
            + 0.5 * (1 - soft_dice(view[:2].softmax(1), y, classes=[1, 2]).mean().item())
            for view in z[key]
        )
        for key in "ab"
    }
    assert {key: float(output.measures[f"score_{key}"]) for key in "ab"} == pytest.approx(scores, rel=1e-5)
    winner, loser = sorted("ab", key=lambda key: scores[key])
    assert float(output.measures["a_wins"]) == (winner == "a")
    competition = sum(
        probability_mse(z[loser][v][2:].softmax(1), sharpen(z[winner][v][2:].log_softmax(1), 0.1)).item()
        for v in (0, 1)
    )
    assert float(output.measures["competition"]) == pytest.approx(competition, rel=1e-5)
    assert output.losses["competition"].item() == pytest.approx(0.01824 * competition, rel=1e-3)


def test_the_contrast_of_a_step_by_hand() -> None:
    method = trainer(**RELEASED)
    batch = batch_of(method.job)
    assert batch.unlabeled is not None
    output = step(method, 1.0, batch)
    rows, decided = {}, {}
    for key in "ab":
        projector = method.parts.trained[f"projector_{key}"]
        images = [torch.cat([batch.labeled.views[v], batch.unlabeled.views[v]]) for v in (0, 1)]
        found = [forward_features(network(method, key), image, ("dec:last",)) for image in images]
        rows[key] = [projector(taps["dec:last"]).movedim(1, -1).flatten(0, -2) for _, taps in found]
        decided[key] = [z[0].argmax(1).flatten() for z, _ in found]
    expected = 0.0
    for i, j in ((0, 0), (1, 1), (0, 1), (1, 0)):
        a, b = decided["a"][i], decided["b"][j]
        s = (rows["a"][i] * rows["b"][j]).sum(1)
        classes = [c for c in (1, 2) if ((a == c) | (b == c)).any()]
        terms = [one_term(s, (a == c) & (b == c)) + one_term(s, ~((a == c) | (b == c))) for c in classes]
        expected += float(torch.stack(terms).mean().detach())
    assert float(output.measures["contrast"]) == pytest.approx(expected, rel=1e-4)
    assert output.losses["contrast"].item() == pytest.approx(2 * expected, rel=1e-4)
    assert float(output.measures["contrast_share"]) == 1, "all 4·256 voxels"
    few = step(trainer(n_voxels=256), 1.0, batch)
    assert float(few.measures["contrast_share"]) == pytest.approx(0.25)
    assert float(few.measures["contrast"]) == pytest.approx(expected, rel=0.1)


def test_sharpening() -> None:
    p = torch.tensor([0.6, 0.4]).view(1, 2, 1)
    assert sharpen(p.log(), 0.1).flatten().tolist() == pytest.approx([0.9830, 0.0170], abs=5e-5)
    uniform = torch.full((1, 3, 1), 1 / 3)
    torch.testing.assert_close(sharpen(uniform.log(), 0.1), uniform)


@pytest.mark.parametrize("better", ["a", "b"])
def test_the_loser_alone_learns_from_the_winners_sharpened_predictions(better: str) -> None:
    method = trainer(lambda_max=1.0, ramp_end=0.0, temperature=0.5)
    batch = batch_of(method.job)
    batch.labeled.targets = (torch.zeros_like(batch.labeled.target),) * 2
    worse = "b" if better == "a" else "a"
    say(network(method, better), (2.0, 0.0, 0.0))
    say(network(method, worse), (0.0, 0.0, 0.0))
    output = step(method, 1.0, batch)
    assert float(output.measures["a_wins"]) == (better == "a")
    q = torch.tensor([4.0, 0.0, 0.0]).softmax(0)
    assert output.losses["competition"].item() == pytest.approx(2 * (q - 1 / 3).square().mean().item(), rel=1e-5)
    output.losses["competition"].backward()
    assert reached(method) == {f"network_{worse}"}
    # the labels' background is absent from the Dice, which nobody is judged by then
    assert float(output.measures[f"score_{worse}"]) == pytest.approx(2 * 0.5 * math.log(3), rel=1e-5)


def test_ties_go_to_the_first_network() -> None:
    method = trainer()
    for key in "ab":
        say(network(method, key), (0.0, 1.0, 0.0))
    assert float(step(method).measures["a_wins"]) == 1


def test_classes_that_no_label_shows_do_not_count_in_the_score() -> None:
    method = trainer(ce_share=0.0)
    batch = batch_of(method.job)
    batch.labeled.targets = (batch.labeled.target.clamp(max=1),) * 2
    for key in "ab":
        say(network(method, key), (0.0, 60.0, 0.0))
    share = (batch.labeled.target == 1).float().mean().item()
    expected = 2 * (1 - 2 * share / (1 + share))
    assert float(step(method, 1.0, batch).measures["score_a"]) == pytest.approx(expected, rel=1e-4)
    by_ce = trainer(ce_share=1.0)
    say(network(by_ce, "a"), (0.0, 0.0, 0.0))
    assert float(step(by_ce, 1.0, batch).measures["score_a"]) == pytest.approx(2 * math.log(3), rel=1e-5)


def test_swapping_the_networks_changes_nothing() -> None:
    first_method, swapped = trainer(), trainer()
    swapped.parts.trained |= {
        f"{part}_{mine}": first_method.parts.trained[f"{part}_{theirs}"]
        for part in ("network", "projector")
        for mine, theirs in ("ab", "ba")
    }
    batch = batch_of(first_method.job)
    first, second = step(first_method, 1.0, batch), step(swapped, 1.0, batch)
    assert float(first.measures["a_wins"]) == 1 - float(second.measures["a_wins"])
    assert total(first).item() == pytest.approx(total(second).item(), rel=1e-6)
    assert first.losses["supervised_a"].item() == second.losses["supervised_b"].item()


def test_each_term_moves_what_it_should() -> None:
    everything = {f"{part}_{key}" for part in ("network", "projector") for key in "ab"}
    networks = {"network_a", "network_b"}
    for name, expected in (("contrast", everything), ("consistency", networks), ("supervised_a", {"network_a"})):
        method = trainer()
        step(method).losses[name].backward()
        assert reached(method) == expected, name
    method = trainer()
    step(method).losses["contrast"].backward()
    for key in "ab":
        assert all(layer.weight.grad is None for layer in network(method, key).decoder.seg_layers), "decisions"


def test_equal_views_are_consistent() -> None:
    method = trainer()
    output = step(method, 1.0, batch_of(method.job, same_views=True))
    assert output.losses["consistency"].item() == pytest.approx(0, abs=1e-6)
    different = step(method).losses["consistency"].item()
    assert 0 < different <= 4
    opposite = trainer()

    def turn(module: Any, given: Any, answered: Tensor) -> Tensor:
        return torch.cat([answered[: len(answered) // 2], -answered[: len(answered) // 2]])

    for key in "ab":
        network(opposite, key).decoder.seg_layers[-1].register_forward_hook(turn)
    assert step(opposite).losses["consistency"].item() == pytest.approx(4, rel=1e-4), "2 for each network"


def test_equal_logits_have_a_bounded_gradient() -> None:
    method = trainer()
    for key in "ab":
        say(network(method, key), (0.0, 0.0, 0.0))
    step(method).losses["consistency"].backward()
    for part in method.parts.trained.values():
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in part.parameters())


def test_weights_over_the_run() -> None:
    method = trainer(**RELEASED)
    assert list(step(method, 0.019).losses) == [*SUPERVISED, "consistency"]
    outputs = {r: step(method, r).measures for r in (0.02, 0.5, 1.0)}
    expected = [0.1 * math.exp(-5 * (1 - r / 2.4) ** 2) for r in outputs]
    assert [float(m["competition_weight"]) for m in outputs.values()] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] == pytest.approx(0.01824, rel=1e-3)
    assert [float(m["contrast_weight"]) for m in outputs.values()] == [2] * 3
    assert list(step(trainer(r_warm=0.3), 0.29).losses) == [*SUPERVISED, "consistency"]
    ours = trainer()
    assert list(step(ours, 0.249).losses) == [*SUPERVISED, "consistency"]
    assert float(step(ours, 0.4).measures["competition_weight"]) == 1
    assert float(step(ours, 0.25).measures["contrast_weight"]) == 0.2


def test_ablation_takes_the_contrast_away() -> None:
    settings = make_settings(CompetitiveContrast, dict(CompetitiveContrast.ablation))
    ablated = CompetitiveContrast(toy_job(), settings)
    full, less = step(trainer()), step(ablated)
    assert set(full.losses) - set(less.losses) == {"contrast"}
    assert full.losses["contrast"].item() > 0
    assert all(full.losses[name].item() == less.losses[name].item() for name in less.losses)
    assert sorted(ablated.parts.trained) == ["network_a", "network_b"], "no projector without a loss"
    for name, key in (("consistency", "lambda_cos"), ("competition", "lambda_max")):
        assert set(full.losses) - set(step(trainer(**{key: 0.0})).losses) == {name}


def test_weights_of_zero_leave_two_supervised_networks() -> None:
    method = trainer(lambda_max=0.0, lambda_iuc=0.0, lambda_cos=0.0)
    batch = batch_of(method.job)
    output = step(method, 1.0, batch)
    assert list(output.losses) == SUPERVISED
    y, valid = batch.labeled.target, batch.labeled.valid
    for key in "ab":
        loss = [method.job.supervised_loss(network(method, key)(view), y, valid) for view in batch.labeled.views]
        assert output.losses[f"supervised_{key}"].item() == pytest.approx(torch.stack(loss).mean().item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- odd input


def test_ignore_label_and_padding() -> None:
    method = trainer(job={"schema": toy_schema(ignore=True)})
    batch = batch_of(method.job)
    assert batch.unlabeled is not None
    keep = torch.ones_like(batch.labeled.valid)
    keep[..., 10:] = False
    batch.labeled.valids = batch.unlabeled.valids = (keep,) * 2
    first = step(method, 1.0, batch)
    batch.labeled.targets = (torch.where(keep, batch.labeled.target, 1),) * 2
    second = step(method, 1.0, batch)
    assert {k: v.item() for k, v in first.losses.items()} == {k: v.item() for k, v in second.losses.items()}
    assert float(first.measures["score_a"]) == float(second.measures["score_a"])
    share = (1 + 10 / 16) / 2  # ignored voxels have no label, but an image
    assert float(first.measures["valid_share"]) == pytest.approx(share)
    assert float(first.measures["contrast_share"]) == pytest.approx(share)


def test_padding_reaches_no_unsupervised_term() -> None:
    """The logits are what they are; outside the image they do not count."""
    method = trainer()
    batch = batch_of(method.job)
    assert batch.unlabeled is not None
    keep = torch.ones_like(batch.unlabeled.valid)
    keep[..., 10:] = False
    batch.unlabeled.valids = (keep,) * 2
    seen: list[Tensor] = []

    def keep_logits(module: Any, given: Any, answered: Tensor) -> None:
        answered.retain_grad()
        seen.append(answered)

    for key in "ab":
        network(method, key).decoder.seg_layers[-1].register_forward_hook(keep_logits)
    output = step(method, 1.0, batch)
    torch.stack([output.losses[name] for name in SPECIAL]).sum().backward()
    for z in seen:
        assert z.grad is not None
        views = z.grad.unflatten(0, (2, 4))
        assert views[:, :2, ..., 10:].any(), "labeled patches are whole"
        assert not views[:, 2:, ..., 10:].any()


@pytest.mark.parametrize("key", ["a", "b"])
def test_a_network_that_is_not_finite_teaches_nothing(key: str) -> None:
    method = trainer()

    def spoil(module: Any, given: Any, answered: Tensor) -> Tensor:
        spoiled = answered.clone()
        spoiled[3] = math.nan  # an unlabeled patch, first view
        return spoiled

    network(method, key).decoder.seg_layers[-1].register_forward_hook(spoil)
    losses = step(method).losses
    assert {name for name, term in losses.items() if not torch.isfinite(term)} == set(SPECIAL)


def test_all_background_has_no_contrast() -> None:
    method = trainer()
    for key in "ab":
        say(network(method, key), (5.0, 0.0, 0.0))
    output = step(method)
    assert output.losses["contrast"].item() == 0
    assert float(output.measures["contrast_classes"]) == 0
    total(output).backward()


def test_regions() -> None:
    method = trainer(job={"schema": toy_schema(regions=True)}, temperature=0.5, lambda_max=1.0, ramp_end=0.0)
    say(network(method, "a"), (2.0, -2.0))
    say(network(method, "b"), (0.0, 0.0))
    output = step(method)
    winner = float(output.measures["a_wins"])
    sharp = torch.sigmoid(torch.tensor([4.0, -4.0])) if winner else torch.tensor([0.5, 0.5])
    p = torch.tensor([0.5, 0.5]) if winner else torch.sigmoid(torch.tensor([2.0, -2.0]))
    assert output.losses["competition"].item() == pytest.approx(2 * (p - sharp).square().mean().item(), rel=1e-4)
    assert output.losses["consistency"].item() == pytest.approx(0, abs=1e-6)
    assert float(output.measures["contrast_classes"]) == 1, "nobody claims the core"
    assert float(output.measures["contrast_disagreement"]) == 1
    assert 0 < step(trainer(job={"schema": toy_schema(regions=True)})).losses["consistency"].item() < 2
    assert method.prediction().activation == "sigmoid"


def test_single_patches_and_volumes() -> None:
    configuration = toy_configuration(3, spacing=(5.0, 1.0, 1.0), patch_size=(8, 16, 16))
    for job in (toy_job(2), toy_job(3), toy_job(3, configuration=configuration)):
        method = CompetitiveContrast(job, CompetitiveContrastSettings(n_voxels=500))
        output = step(method, 1.0, batch_of(job, 1, 1))
        assert list(output.losses) == [*SUPERVISED, *SPECIAL]
        total(output).backward()
        for part in method.parts.trained.values():
            assert all(p.grad is None or torch.isfinite(p.grad).all() for p in part.parameters())


def test_without_unlabeled_cases_it_is_the_twin_or_two_networks_that_contrast() -> None:
    alone = trainer(n_unlabeled=0)
    assert alone.request(Progress(0, 1)).labeled.views == 1
    batch = batch_of(alone.job, n_unlabeled=0)
    twin = Supervised(toy_job(n_unlabeled=0), MethodSettings())
    expected, found = twin.losses(batch, Progress(50, 100)).losses, step(alone, 1.0, batch).losses
    assert list(found) == list(expected)
    assert torch.equal(found["supervised"], expected["supervised"])
    assert alone.alternative_predictions() == {}
    pair = trainer(n_unlabeled=0, labeled_only=True)
    assert list(step(pair, 1.0, batch).losses) == [*SUPERVISED, "consistency", "contrast"]


def test_two_views_of_everything_are_asked_for() -> None:
    request = trainer().request(Progress(0, 1))
    assert (request.labeled.views, request.unlabeled.views) == (2, 2)
    assert request.labeled.shared_geometry
    assert request.unlabeled.shared_geometry
    assert request.labeled.sampler == "foreground"


@pytest.mark.parametrize("residual_plan", [False, True])
def test_the_networks_have_different_architectures_and_their_mean_predicts(residual_plan: bool) -> None:
    own = toy_architecture(2, (4, 8, 8))
    configuration = toy_configuration(2, architecture=residual_twin(own) if residual_plan else own)
    method = trainer(job={"configuration": configuration})
    spec = method.prediction()
    assert (spec.combine, spec.activation) == ("mean_probabilities", "softmax")
    names = [member.architecture.network_class_name for member in spec.members]
    assert set(names) == set(NETWORK_CLASSES.values())
    assert [type(network(method, key)).__name__ for key in "ab"] == [name.rsplit(".", 1)[1] for name in names]
    alternatives = method.alternative_predictions()
    assert [alternatives[f"network_{key}"].members[0] for key in "ab"] == list(spec.members)


def test_draws_depend_on_the_step() -> None:
    method = trainer(n_voxels=100)
    batch = batch_of(method.job)
    first, again = (method.losses(batch, Progress(50, 100)).losses["contrast"].item() for _ in range(2))
    other = method.losses(batch, replace(Progress(50, 100), step=51)).losses["contrast"].item()
    assert first == again != other
