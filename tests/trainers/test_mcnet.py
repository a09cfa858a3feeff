"""The checks of mcnet's specification, through `losses()` where they are about the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from autossl.inference.predictor import Predictor, Window
from autossl.networks.features import decode, encode
from autossl.trainers.base import Batch, MethodSettings, Progress, StepOutput
from autossl.trainers.checkpoints import parts_state
from autossl.trainers.components.pseudo import sharpen
from autossl.trainers.methods.mcnet import (
    MutualConsistency,
    MutualConsistencySettings,
    mutual_consistency,
    sharpen_channels,
)
from autossl.trainers.methods.supervised import Supervised
from toys import toy_architecture, toy_batch, toy_configuration, toy_job, toy_schema


def trainer(
    dims: int = 2, n_unlabeled: int = 4, n_classes: int = 2, regions: bool = False, plan: Any = None, **settings: Any
) -> MutualConsistency:
    job = toy_job(
        n_unlabeled=n_unlabeled, schema=toy_schema(n_classes, regions), configuration=plan or toy_configuration(dims)
    )
    return MutualConsistency(job, MutualConsistencySettings(**settings))


def batch_of(method: MutualConsistency, **options: Any) -> Batch:
    batch = toy_batch(method.job, **options)
    if not method.job.schema.has_regions:
        batch.labeled.targets = (batch.labeled.target.clamp(max=method.job.schema.n_outputs - 1),)
    return batch


def step(method: MutualConsistency, batch: Batch | None = None, fraction: float = 1.0) -> StepOutput:
    return method.losses(batch or batch_of(method), Progress(step=int(100 * fraction), total=100))


def set_outputs(method: MutualConsistency, logits: tuple[float, ...]) -> None:
    """Makes all decoders answer the same logits everywhere."""
    network: Any = method.parts.trained["network"]
    others: list[Any] = [module.heads for name, module in method.parts.trained.items() if name != "network"]
    for layers in (network.decoder.seg_layers, *others):
        for layer in layers:
            nn.init.zeros_(layer.weight)
            layer.bias.data = torch.tensor(logits)


# ---------------------------------------------------------------------------------------------------------- the term


def test_sharpening() -> None:
    two = torch.tensor([[0.6, 0.4]]).log()
    assert sharpen(two).flatten().tolist() == pytest.approx([0.98295, 0.01705], abs=1e-5)
    assert sharpen_channels(two, 0.1).flatten().tolist() == pytest.approx([0.98295, 0.01705], abs=1e-5)
    three = torch.tensor([[0.40, 0.35, 0.25]]).log()
    assert sharpen_channels(three, 0.1).flatten().tolist() == pytest.approx([0.0170, 0.0020, 0.00002], abs=5e-5)
    assert sharpen(three).flatten().tolist() == pytest.approx([0.7861, 0.2068, 0.0071], abs=1e-4)


@pytest.mark.parametrize("n_decoders, expected", [(2, 0.29331), (3, 0.87992)])
def test_closed_form_of_equal_decoders(n_decoders: int, expected: float) -> None:
    method = trainer(n_classes=1, n_decoders=n_decoders, lambda_max=0.5)
    set_outputs(method, (0.4054651, 0.0))  # p = (0.6, 0.4)
    output = step(method)
    assert float(output.measures["consistency"]) == pytest.approx(expected, abs=1e-5)
    assert output.losses["consistency"].item() == pytest.approx(0.5 * expected, abs=1e-5)
    assert float(output.measures["disagreement"]) == 0


def test_regions_are_sharpened_each_for_itself() -> None:
    method = trainer(regions=True, n_decoders=2)
    set_outputs(method, (0.4054651, 0.0))  # 0.6 and 0.5, which stays 0.5
    assert float(step(method).measures["consistency"]) == pytest.approx(2 * 0.14665 / 2, abs=1e-5)


def test_the_release_sharpens_classes_each_for_itself() -> None:
    method = trainer(sharpen="channel", n_decoders=2)
    set_outputs(method, tuple(torch.tensor([0.40, 0.35, 0.25]).log().tolist()))
    expected = 2 * ((0.40 - 0.0170) ** 2 + (0.35 - 0.0020) ** 2 + 0.25**2) / 3
    assert float(step(method).measures["consistency"]) == pytest.approx(expected, abs=1e-4)


def test_certain_agreement_costs_nothing_and_half_precision_does_not_underflow() -> None:
    method = trainer()
    set_outputs(method, (90.0, -90.0, -90.0))
    assert step(method).losses["consistency"].item() == 0
    z = torch.tensor([[1.0, 0.0, -1.0]])
    torch.testing.assert_close(sharpen(torch.log_softmax(z.half().float(), 1)).sum(), torch.tensor(1.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert sharpen_channels(z.half(), 0.1).dtype == torch.float32


def test_value_and_gradient_are_those_of_the_equation_by_finite_differences() -> None:
    method = trainer()
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(1, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3)]

    def written(levels: list[Tensor]) -> float:
        total = 0.0
        for i, own in enumerate(levels):
            for j, other in enumerate(levels):
                if i != j:
                    q = other.softmax(1) ** 10 / (other.softmax(1) ** 10).sum(1, keepdim=True)
                    total += float((own.softmax(1) - q).square().mean())
        return total

    leaves = [level.float().requires_grad_() for level in z]
    loss = method._mutual_consistency(leaves, torch.ones(1, 1, 2, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx(written(z), rel=1e-5)
    loss.backward()
    for index, leaf in enumerate(leaves):
        numeric = torch.zeros_like(z[index])
        for place in range(numeric.numel()):
            moved = [[level.clone() for level in z] for _ in range(2)]
            for sign, levels in zip((1, -1), moved, strict=True):
                levels[index].view(-1)[place] += sign * 1e-5
            numeric.view(-1)[place] = (written(moved[0]) - written(moved[1])) / 2e-5
        torch.testing.assert_close(leaf.grad, numeric.float(), rtol=1e-3, atol=1e-5)


def test_detached_targets_pass_no_gradient() -> None:
    z = [torch.randn(1, 3, 4, 4, requires_grad=True) for _ in range(2)]
    valid = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    p = [logits.softmax(1) for logits in z]
    q = [sharpen(torch.log_softmax(logits, 1)) for logits in z]
    one_way = mutual_consistency([p[0], p[1].detach()], [q[0].detach(), q[1].detach()])
    assert torch.autograd.grad(one_way, z, allow_unused=True, retain_graph=True)[1] is None
    results = {}
    for detach in (False, True):
        loss = trainer(detach_targets=detach)._mutual_consistency(z, valid)
        results[detach] = (loss.detach(), *torch.autograd.grad(loss, z))
    assert torch.equal(results[True][0], results[False][0])
    assert not torch.allclose(results[True][1], results[False][1])
    expected = torch.autograd.grad(mutual_consistency(p, [target.detach() for target in q]), z)
    torch.testing.assert_close(results[True][1:], expected)


def test_voxels_outside_the_image_do_not_count_and_ignored_ones_do() -> None:
    method = trainer()
    batch = batch_of(method)
    assert batch.unlabeled is not None
    outside = torch.zeros_like(batch.unlabeled.valid)
    batch.unlabeled.valids = (outside,)
    first = step(method, batch)
    assert float(first.measures["valid_share"]) == 0.5
    batch.unlabeled.views = (batch.unlabeled.image + 1,)
    assert float(step(method, batch).measures["consistency"]) == pytest.approx(
        float(first.measures["consistency"]), rel=1e-5
    )
    batch.labeled.valids = (outside,)
    torch.testing.assert_close(step(method, batch).losses["consistency"], first.losses["consistency"])


# --------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("dims, weights", [(2, [0.0135, 0.573, 2.0]), (3, [0.0135, 2.0, 2.0])])
def test_weights_follow_the_dimension(dims: int, weights: list[float]) -> None:
    method = trainer(dims)
    batch = batch_of(method, n_labeled=1, n_unlabeled=1)
    found = [float(step(method, batch, r).measures["consistency_weight"]) for r in (0, 0.5, 1)]
    assert found == pytest.approx(weights, rel=2e-3)


def test_the_supervised_term_is_the_sum_over_decoders() -> None:
    method = trainer()
    batch = batch_of(method)
    skips = encode(method.parts.trained["network"], batch.labeled.image)
    first, _ = decode(method.parts.trained["network"], skips)
    others = [method.parts.trained[name](skips) for name in ("linear_decoder", "nearest_decoder")]
    assert [len(z) for z in (first, *others)] == [2, 1, 1]
    parts = [method.job.supervised_loss(z, batch.labeled.target, batch.labeled.valid) for z in (first, *others)]
    output = step(method, batch)
    torch.testing.assert_close(output.losses["supervised"], sum(parts))  # type: ignore[operator]
    assert float(output.measures["supervised_nearest_decoder"]) == pytest.approx(float(parts[2].detach()), rel=1e-5)
    deep = trainer(ds_all=True)
    skips = encode(deep.parts.trained["network"], batch.labeled.image)
    assert len(deep.parts.trained["linear_decoder"](skips)) == 2


@pytest.mark.parametrize("odd", [False, True])
def test_all_decoders_answer_alike_on_anisotropic_plans(odd: bool) -> None:
    architecture = toy_architecture(3, (4, 6, 8), strides=((1, 2, 2), (1, 2, 2)))
    plan = toy_configuration(3, patch_size=(3, 12, 20) if odd else (4, 16, 16), architecture=architecture)
    method = trainer(plan=plan)
    output = step(method, batch_of(method, n_labeled=1, n_unlabeled=1))
    assert torch.isfinite(output.losses["consistency"])
    linear, nearest = (method.parts.trained[name] for name in ("linear_decoder", "nearest_decoder"))
    assert sum(p.numel() for p in linear.parameters()) == sum(p.numel() for p in nearest.parameters())


@pytest.mark.parametrize("term", ["supervised", "consistency"])
def test_both_terms_reach_the_encoder_and_every_decoder(term: str) -> None:
    method = trainer()
    step(method).losses[term].backward()
    network: Any = method.parts.trained["network"]
    reached = [network.encoder, network.decoder.seg_layers[-1], network.decoder.transpconvs]
    for module in (*reached, method.parts.trained["linear_decoder"], method.parts.trained["nearest_decoder"]):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in list(module.parameters())[:1])


def test_the_plans_decoder_predicts_as_a_standard_network() -> None:
    method = trainer()
    plain = method.job.build_network("other")
    plain.load_state_dict(method.parts.trained["network"].state_dict())
    spec = method.prediction()
    assert (spec.combine, spec.members[0].name, spec.members[0].decoders) == ("single", "network", ())


@pytest.mark.parametrize("settings", [{}, {"n_decoders": 2}, {"ds_all": True}, {"regions": True}])
def test_the_ensemble_predicts_the_mean_of_its_decoders(settings: dict[str, Any]) -> None:
    method = trainer(ensemble=True, **settings)
    assert list(method.alternative_predictions()) == ["first_decoder"]
    assert trainer(**settings).alternative_predictions()["ensemble"] == method.prediction()
    state = parts_state(method.parts)["networks"]
    plan = method.job.configuration
    predictor = Predictor.from_state_dicts(
        method.prediction(), [state], plan, method.job.schema, Window.of(plan, False)
    )
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        skips = encode(method.parts.trained["network"], image)
        z = [decode(method.parts.trained["network"], skips)[0]]
        z += [method.parts.trained[name](skips) for name in method._variants]
        expected = torch.stack([method.job.probabilities(levels[0]) for levels in z]).mean(0)[0]
    found = method.job.probabilities(predictor.logits(image)[:, 0][None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_weight_three_decoders_learn_from_labels_alone() -> None:
    method = trainer(lambda_max=0.0)
    output = step(method)
    assert list(output.losses) == ["supervised"]
    torch.testing.assert_close(output.losses["supervised"], step(trainer()).losses["supervised"])


def test_no_unlabeled_case_is_the_twin_unless_asked_otherwise() -> None:
    method = trainer(n_unlabeled=0, ensemble=True)
    batch = batch_of(method, n_unlabeled=0)
    twin = Supervised(toy_job(), MethodSettings()).losses(batch, Progress(100, 100))
    mine = step(method, batch)
    assert list(mine.losses) == ["supervised"]
    assert torch.equal(mine.losses["supervised"], twin.losses["supervised"])
    assert list(method.parts.trained) == ["network"]
    assert method.prediction().combine == "single"
    assert method.alternative_predictions() == {}
    method = trainer(n_unlabeled=0, labeled_only=True)
    assert step(method, batch).losses["consistency"].item() > 0


def test_after_training_decoders_disagree_where_they_err() -> None:
    method = trainer(lambda_max=0.05)
    parameters = [p for module in method.parts.trained.values() for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    for index in range(60):
        optimizer.zero_grad()
        batch = batch_of(method, seed=index)
        sum(method.losses(batch, Progress(index, 60)).losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    batch = batch_of(method, seed=99, n_labeled=8)
    with torch.no_grad():
        skips = encode(method.parts.trained["network"], batch.labeled.image)
        z = [decode(method.parts.trained["network"], skips)[0][0]]
        z += [method.parts.trained[name](skips)[0] for name in method._variants]
        p = torch.stack([logits.softmax(1) for logits in z])
    disagreement = p.var(0).sum(1)
    error = 1 - p.mean(0).gather(1, batch.labeled.target)[:, 0]
    assert spearmanr(disagreement.flatten(), error.flatten()).statistic > 0.3
