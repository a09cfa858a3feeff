"""The checks of cps's specification, through `losses()`."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autossl.planners.plans import NETWORK_CLASSES
from autossl.trainers.base import Batch, MethodSettings, Phase, Progress, StepOutput
from autossl.trainers.methods import cps
from autossl.trainers.methods.cps import CPS, CPSSettings
from autossl.trainers.methods.supervised import Supervised
from toys import toy_architecture, toy_batch, toy_configuration, toy_job, toy_schema

SUPERVISED = ["supervised_a", "supervised_b"]
CROSS = ["cross_a", "cross_b"]


def trainer(n_unlabeled: int = 4, job: dict[str, Any] | None = None, **settings: Any) -> CPS:
    return CPS(toy_job(n_unlabeled=n_unlabeled, **(job or {})), CPSSettings(**settings))


def network(method: CPS, key: str) -> Any:
    return method.parts.trained[f"network_{key}"]


def set_outputs(module: Any, logits: tuple[float, ...]) -> None:
    """Makes a network answer the same logits everywhere."""
    for layer in module.decoder.seg_layers:
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor(logits)


def step(method: CPS, fraction: float = 1.0, batch: Batch | None = None, seed: int = 0) -> StepOutput:
    return method.losses(batch or toy_batch(method.job), Progress(step=int(100 * fraction), total=100, seed=seed))


def total(output: StepOutput) -> Tensor:
    return torch.stack(list(output.losses.values())).sum()


def gradients(method: CPS) -> dict[str, list[Tensor | None]]:
    return {key: [p.grad for p in network(method, key).parameters()] for key in "ab"}


# ------------------------------------------------------------------------------------------------------------- values


def test_uniform_logits_cost_ln_c_whatever_the_label() -> None:
    method = trainer(job={"schema": toy_schema(3)})
    set_outputs(network(method, "a"), (0.0,) * 4)
    for label in range(4):
        set_outputs(network(method, "b"), tuple(float(index == label) for index in range(4)))
        assert float(step(method).measures["cross_a"]) == pytest.approx(math.log(4))
    set_outputs(network(method, "b"), (0.0,) * 4)
    assert [float(step(method).measures[name]) for name in CROSS] == pytest.approx([math.log(4)] * 2)


def test_closed_form_of_two_classes() -> None:
    method = trainer(job={"schema": toy_schema(1)})
    batch = toy_batch(method.job)
    batch.labeled.targets = (batch.labeled.target.clamp(max=1),)
    set_outputs(network(method, "a"), (2.0, 0.0))
    set_outputs(network(method, "b"), (0.0, 1.0))
    output = step(method, batch=batch)
    assert float(output.measures["cross_a"]) == pytest.approx(math.log(1 + math.e**2))
    assert float(output.measures["cross_b"]) == pytest.approx(math.log(1 + math.e))
    assert sum(output.losses[name].item() for name in CROSS) == pytest.approx(0.1 * 3.4402, rel=1e-4)
    assert float(output.measures["disagreement"]) == 1
    set_outputs(network(method, "b"), (60.0, 0.0))
    set_outputs(network(method, "a"), (60.0, 0.0))
    certain = step(method, batch=batch)
    assert [certain.losses[name].item() for name in CROSS] == pytest.approx([0, 0], abs=1e-7)
    assert float(certain.measures["disagreement"]) == 0


def test_weight_follows_the_ramp_from_the_end_of_the_warm_up_on() -> None:
    method = trainer()  # four labeled cases: 0.05
    outputs = {r: step(method, r) for r in (0, 0.04, 0.05, 0.5, 1)}
    assert [list(outputs[r].losses) for r in (0, 0.04)] == [SUPERVISED] * 2
    weights = [float(outputs[r].measures["cross_weight"]) for r in (0.05, 0.5, 1)]
    assert weights == pytest.approx([0.1 * math.exp(-5 * 0.95**2), 0.1 * 0.2865048, 0.1], rel=1e-5)
    assert outputs[0.5].losses["cross_a"].item() == pytest.approx(
        weights[1] * float(outputs[0.5].measures["cross_a"]), rel=1e-5
    )


@pytest.mark.parametrize("n_labeled, r_warm, first", [(4, None, 0.05), (5, None, 0.02), (4, 0.3, 0.3), (8, 0.0, 0.0)])
def test_warm_up_is_longer_with_very_few_labeled_cases(n_labeled: int, r_warm: float | None, first: float) -> None:
    job = toy_job()
    object.__setattr__(job, "n_labeled", n_labeled)
    method = CPS(job, CPSSettings(r_warm=r_warm))
    active = [r for r in (0.0, 0.01, 0.02, 0.04, 0.05, 0.29, 0.3) if len(step(method, r).losses) == 4]
    assert active[0] == first


def test_all_levels_are_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = cps.hard_label_ce

    def keep(z: list[Tensor], *rest: Any, **named: Any) -> Tensor:
        seen.append(len(z))
        return original(z, *rest, **named)

    monkeypatch.setattr(cps, "hard_label_ce", keep)
    step(trainer(job={"configuration": toy_configuration(2, architecture=toy_architecture(2, (4, 8, 8, 8)))}))
    assert seen == [3, 3]


def test_dice_can_be_added() -> None:
    plain, both = trainer(), trainer(cps_dice=True)
    for method in (plain, both):
        set_outputs(network(method, "a"), (0.0, 0.0, 0.0))
        set_outputs(network(method, "b"), (0.0, 60.0, 0.0))
    ce = float(step(plain).measures["cross_a"])
    assert ce == pytest.approx(math.log(3))
    dice = (2 / 3) / (1 / 3 + 1)  # class 1; class 2 is predicted with 1/3 and absent
    assert float(step(both).measures["cross_a"]) == pytest.approx(ce + 1 - dice / 2, rel=1e-4)


def test_regions_are_labeled_channel_by_channel() -> None:
    method = trainer(job={"schema": toy_schema(regions=True)})
    set_outputs(network(method, "a"), (0.0, 0.0))
    set_outputs(network(method, "b"), (2.0, -2.0))
    output = step(method)
    assert float(output.measures["cross_a"]) == pytest.approx(math.log(2))
    # a's labels are 0 in both channels (0.5 is not above 0.5)
    assert float(output.measures["cross_b"]) == pytest.approx((math.log(1 + math.e**2) + math.log(1 + math.e**-2)) / 2)
    assert float(output.measures["disagreement"]) == 1
    assert output.losses["supervised_a"].isfinite()


def test_voxels_outside_the_image_do_not_count() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    batch.unlabeled.valids = (torch.zeros_like(batch.unlabeled.valid),)
    output = step(method, batch=batch)
    assert [output.losses[name].item() for name in CROSS] == [0, 0]
    assert float(output.measures["valid_share"]) == 0
    assert float(output.measures["disagreement"]) == 0
    total(output).backward()


# -------------------------------------------------------------------------------------------------------- two networks


def test_swapping_the_networks_changes_nothing() -> None:
    method, swapped = trainer(), trainer()
    for mine, theirs in (("a", "b"), ("b", "a")):
        network(swapped, mine).load_state_dict(network(method, theirs).state_dict())
    first, second = step(method), step(swapped)
    assert first.losses["cross_a"].item() == second.losses["cross_b"].item()
    assert total(first).item() == pytest.approx(total(second).item(), rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"cutmix": True}, {"sequential": True}, {"on_labeled": True}])
def test_a_term_moves_its_own_network_alone(settings: dict[str, Any]) -> None:
    for own, other in ("ab", "ba"):
        for name in (f"supervised_{own}", f"cross_{own}"):
            method = trainer(**settings)
            step(method).losses[name].backward()
            found = gradients(method)
            assert any(gradient is not None and gradient.any() for gradient in found[own]), name
            assert all(gradient is None for gradient in found[other]), name


@pytest.mark.parametrize("settings", [{}, {"cutmix": True}, {"on_labeled": True}])
def test_a_network_that_is_not_finite_labels_nothing(settings: dict[str, Any]) -> None:
    """Hard labels would hide it from the other network's term."""
    method = trainer(**settings)

    def spoil(module: nn.Module, given: Any, answered: Tensor) -> Tensor:
        spoiled = answered.clone()
        if torch.is_grad_enabled() != method.settings.cutmix:  # with cutmix in the pass that labels, and there alone
            spoiled[-1] = math.inf
        return spoiled

    network(method, "a").decoder.seg_layers[-1].register_forward_hook(spoil)
    losses = step(method).losses
    bad = {name for name, term in losses.items() if not torch.isfinite(term)}
    assert bad == ({"cross_b"} if method.settings.cutmix else {*CROSS})


def test_the_networks_start_apart_and_equal_ones_stay_equal(caplog: pytest.LogCaptureFixture) -> None:
    method = trainer()
    pairs = list(zip(network(method, "a").parameters(), network(method, "b").parameters(), strict=True))
    assert all(not torch.equal(a, b) for a, b in pairs if a.ndim > 1), "every convolution is drawn twice"
    with caplog.at_level(logging.WARNING):
        method.on_phase(Phase("train"), Progress(0, 100))
        assert not caplog.records
        network(method, "b").load_state_dict(network(method, "a").state_dict())
        method.on_phase(Phase("train"), Progress(0, 100))
    assert "will stay the same" in caplog.text
    total(step(method)).backward()
    found = gradients(method)
    assert all(a is b or torch.equal(a, b) for a, b in zip(found["a"], found["b"], strict=True))  # type: ignore[arg-type]


def test_zero_weight_decouples_the_networks() -> None:
    """Each equals its own supervised run with the same data."""
    method = trainer(lambda_max=0.0)
    batch = toy_batch(method.job)
    output = step(method, batch=batch)
    assert list(output.losses) == SUPERVISED
    total(output).backward()
    for key in "ab":
        twin = Supervised(toy_job(), MethodSettings())
        twin.parts.trained["network"].load_state_dict(network(method, key).state_dict())
        alone = twin.losses(batch, Progress(50, 100)).losses["supervised"]
        alone.backward()
        assert torch.equal(output.losses[f"supervised_{key}"], alone)
        pairs = zip(network(method, key).parameters(), twin.parts.trained["network"].parameters(), strict=True)
        for mine, theirs in pairs:
            assert (mine.grad is None) == (theirs.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("settings", [{}, {"cutmix": True, "on_labeled": True}])
def test_sequential_is_the_same_step(settings: dict[str, Any]) -> None:
    at_once, in_turn = trainer(**settings), trainer(sequential=True, **settings)
    outputs = [step(at_once), step(in_turn)]
    assert list(outputs[0].losses) == list(outputs[1].losses)
    for name, term in outputs[0].losses.items():
        assert term.item() == pytest.approx(outputs[1].losses[name].item(), abs=1e-6)
    for output in outputs:
        total(output).backward()
    for key in "ab":
        for one, other in zip(gradients(at_once)[key], gradients(in_turn)[key], strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or (one - other).abs().max() < 1e-6


def test_sequential_keeps_no_feature_maps_for_the_backward_pass() -> None:
    def kept(method: CPS) -> int:
        """Elements saved for the backward pass by the networks."""
        sizes = []
        batch = toy_batch(method.job)

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            method._logits(network(method, "a"), batch.labeled.image)
        return sum(sizes)

    assert kept(trainer(sequential=True)) < 0.1 * kept(trainer())


def test_disagreement_falls_in_training() -> None:
    method = trainer(lambda_max=1.0, ramp_end=0.2, r_warm=0.0)
    optimizer = torch.optim.SGD([p for m in method.parts.trained.values() for p in m.parameters()], 0.02, momentum=0.9)
    shares = []
    for index in range(60):
        output = method.losses(toy_batch(method.job, index), Progress(index, 60))
        shares.append(float(output.measures["disagreement"]))
        optimizer.zero_grad()
        total(output).backward()
        optimizer.step()
    assert sum(shares[-10:]) < 0.5 * sum(shares[:10])


# ------------------------------------------------------------------------------------------------------------ options


def test_on_labeled_judges_the_labeled_patches_too() -> None:
    method = trainer(on_labeled=True, job={"schema": toy_schema(ignore=True)})
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    batch.unlabeled.valids = (torch.zeros_like(batch.unlabeled.valid),)
    assert step(method, batch=batch).losses["cross_a"].item() > 0
    batch.labeled.valids = (torch.zeros_like(batch.labeled.valid),)
    assert step(method, batch=batch).losses["cross_a"].item() == 0, "ignore voxels do not count"


class ByValue(nn.Module):
    """Says class round(value); a given value is not known and called background."""

    def __init__(self, unknown: int) -> None:
        super().__init__()
        self.unknown = unknown
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        self.seen.append(x)
        value = torch.where(x.round() == self.unknown, 0.0, x.round())
        return [(value == torch.arange(3.0).view(1, 3, 1, 1)).float().requires_grad_()]


def test_cutmix_labels_come_from_the_unmixed_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Tensor, Tensor]] = []

    def keep(z: list[Tensor], target: Tensor, valid: Tensor, regions: bool) -> Tensor:
        found.append((target, valid))
        return z[0].sum() * 0

    monkeypatch.setattr(cps, "hard_label_ce", keep)
    method = trainer(cutmix=True)
    for key, unknown in (("a", 1), ("b", 2)):
        method.parts.trained[f"network_{key}"] = ByValue(unknown)
    batch = toy_batch(method.job, n_unlabeled=3)
    assert batch.unlabeled is not None
    batch.unlabeled.views = (torch.arange(3.0).view(3, 1, 1, 1).expand(-1, 1, 16, 16).clone(),)
    batch.unlabeled.valids = (batch.unlabeled.image != 0,)
    step(method, batch=batch)
    before, mixed = network(method, "a").seen
    assert torch.equal(before, batch.unlabeled.image)
    assert torch.equal(mixed[:2], batch.labeled.image)
    assert torch.equal(mixed, network(method, "b").seen[1]), "both see the same boxes"
    mixed = mixed[2:]
    assert all(len(patch.unique()) == 2 for patch in mixed)
    (for_a, valid), (for_b, _) = found
    assert torch.equal(for_a, torch.where(mixed == 2, 0, mixed).long()), "what b said"
    assert torch.equal(for_b, torch.where(mixed == 1, 0, mixed).long()), "what a said"
    assert torch.equal(valid, mixed != 0)


def test_cutmix_of_a_single_patch_is_the_plain_step() -> None:
    batch = toy_batch(toy_job(), n_unlabeled=1)
    plain, mixed = step(trainer(), batch=batch), step(trainer(cutmix=True), batch=batch)
    assert total(plain).item() == pytest.approx(total(mixed).item(), rel=1e-6)


def test_the_second_network_can_be_residual() -> None:
    method = trainer(arch_b="resenc")
    members = method.prediction().members
    names = [member.architecture.network_class_name for member in members]
    assert names == [NETWORK_CLASSES["plain"], NETWORK_CLASSES["resenc"]]
    assert type(network(method, "b")).__name__ == "ResidualEncoderUNet"
    method.on_phase(Phase("train"), Progress(0, 100))
    total(step(method)).backward()
    assert all(any(g is not None and g.any() for g in found) for found in gradients(method).values())


def test_without_unlabeled_cases_it_is_the_twin_or_two_of_them() -> None:
    batch = toy_batch(toy_job(), n_unlabeled=0)
    alone = trainer(n_unlabeled=0)
    twin = Supervised(toy_job(n_unlabeled=0), MethodSettings())
    assert alone.request(Progress(0, 1)).unlabeled.count == 0
    expected = twin.losses(batch, Progress(50, 100)).losses
    found = step(alone, batch=batch).losses
    assert list(found) == list(expected)
    assert torch.equal(found["supervised"], expected["supervised"])
    assert [member.name for member in alone.prediction().members] == ["network"]
    assert alone.alternative_predictions() == {}
    alone.on_phase(Phase("train"), Progress(0, 100))
    pair = trainer(n_unlabeled=0, labeled_only=True)
    assert list(step(pair, batch=batch).losses) == SUPERVISED
    assert pair.prediction().combine == "mean_probabilities"
    assert list(step(trainer(n_unlabeled=0, on_labeled=True), batch=batch).losses) == ["supervised"]
    judged = trainer(n_unlabeled=0, labeled_only=True, on_labeled=True)
    assert step(judged, batch=batch).losses["cross_a"].item() > 0


def test_the_mean_predicts_or_one_of_the_two() -> None:
    spec = trainer().prediction()
    assert [member.name for member in spec.members] == ["network_a", "network_b"]
    assert (spec.combine, spec.activation) == ("mean_probabilities", "softmax")
    assert list(trainer().alternative_predictions()) == ["network_a", "network_b"]
    single = trainer(single="B", arch_b="resenc")
    assert [member.name for member in single.prediction().members] == ["network_b"]
    assert single.prediction().members[0].architecture.network_class_name == NETWORK_CLASSES["resenc"]
    assert single.prediction().combine == "single"
    assert list(single.alternative_predictions()) == ["mean"]
    regions = trainer(job={"schema": toy_schema(regions=True)}).prediction()
    assert regions.activation == "sigmoid"
