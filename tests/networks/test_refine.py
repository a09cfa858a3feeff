"""The refine head: equal at the start, where gradients go, and prediction from a checkpoint with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autossl.data.problems import InvalidInput
from autossl.inference.checkpoint import FORMAT, read_trained_networks
from autossl.inference.predictor import Predictor, Window
from autossl.networks.build import build_network, residual_twin
from autossl.networks.features import decode, encode
from autossl.networks.prediction import Member, PredictionSpec, build_member, member_parts
from autossl.networks.refine import RefinedNetwork, RefineHead
from toys import toy_architecture, toy_configuration, toy_schema

SHAPES = {
    "2d": (toy_architecture(2, (4, 8)), (12, 20)),
    "isotropic": (toy_architecture(3, (4, 8)), (8, 12, 8)),
    "anisotropic": (toy_architecture(3, (4, 8), anisotropic=True), (3, 12, 8)),
    "residual": (residual_twin(toy_architecture(2, (4, 8))), (12, 20)),
}


def member_of(name: str = "network", head: str | None = "refine") -> Member:
    return Member(name=name, architecture=toy_architecture(2, (4, 8, 8)), head=head)


def moved(head: RefineHead) -> RefineHead:
    """As it is after some training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        nn.init.normal_(head.correction.weight)
    return head


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_refined_is_coarse_at_the_start(shape: str, activation: Any) -> None:
    architecture, size = SHAPES[shape]
    network = build_network(architecture, 2, 3, seed=0)
    head = RefineHead(architecture, 3, activation, seed=1)
    x = torch.randn(2, 2, *size)
    logits, features = decode(network, encode(network, x))
    refined = head(features[-1], logits[0])
    assert torch.equal(refined, logits[0])
    assert not torch.equal(moved(head)(features[-1], logits[0]), logits[0])
    blocks: Any = head.blocks
    assert list(blocks[0].conv.kernel_size) == architecture.arch_kwargs["kernel_sizes"][0], "in plane as the plan's"
    assert blocks[0].conv.in_channels == 4 + 3
    assert blocks[1].conv.out_channels == 4


def test_the_head_sees_probabilities_without_their_gradient() -> None:
    head = moved(RefineHead(toy_architecture(2, (4, 8)), 3, seed=1))
    features, coarse = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 3, 8, 8, requires_grad=True)
    (head(features, coarse) - coarse).sum().backward()
    assert coarse.grad is not None
    assert coarse.grad.abs().max() < 1e-6, "the correction does not depend on the coarse logits' gradient"
    assert features.grad is not None
    assert features.grad.any()
    generic = moved(RefineHead(toy_architecture(2, (4, 8)), 3, seed=1))(features, coarse + torch.tensor(2.0))
    torch.testing.assert_close(generic - 2, head(features, coarse), msg="of softmax, which a shift leaves alone")


def test_weights_come_from_the_seed_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = RefineHead(toy_architecture(2, (4, 8)), 3, seed=1).state_dict()
    assert torch.equal(torch.rand(1), expected)
    again, other = (RefineHead(toy_architecture(2, (4, 8)), 3, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_member_with_a_head_is_the_network_and_the_head() -> None:
    member = member_of()
    assert member.parts == ("network", "network_refine")
    built = build_member(member, n_channels=1, n_outputs=3)
    assert isinstance(built, RefinedNetwork)
    assert list(member_parts(member, built)) == ["network", "network_refine"]
    assert not built.training
    assert not any(parameter.requires_grad for parameter in built.parameters())
    assert build_member(member_of(head=None), 1, 3)(torch.rand(1, 1, 8, 8)).shape == (1, 3, 8, 8)


def test_heads_are_few_and_take_probabilities() -> None:
    with pytest.raises(ValueError, match="head 'smooth' is unknown; known: refine"):
        member_of(head="smooth")
    with pytest.raises(ValueError, match="softmax or sigmoid"):
        PredictionSpec(members=(member_of(),), activation="dirichlet")
    spec = PredictionSpec(members=(member_of(), member_of("second")), combine="mean_probabilities")
    assert PredictionSpec.from_json(spec.to_json()) == spec
    with pytest.raises(ValueError, match="distinct names"):
        PredictionSpec(members=(member_of(), member_of("network_refine", None)), combine="mean_probabilities")


@pytest.mark.parametrize("regions", [False, True])
def test_a_checkpoint_predicts_what_the_training_saw(regions: bool, tmp_path: Path) -> None:
    """The weights of the projector lie beside, and are not needed."""
    plan, schema = toy_configuration(2), toy_schema(regions=regions)
    activation: Any = "sigmoid" if regions else "softmax"
    network = build_network(plan.architecture, 1, schema.n_outputs, seed=0)
    head = moved(RefineHead(plan.architecture, schema.n_outputs, activation, seed=1))
    spec = PredictionSpec(
        members=(Member(name="network", architecture=plan.architecture, head="refine"),), activation=activation
    )
    states = {
        "network": network.state_dict(),
        "network_refine": head.state_dict(),
        "projector": nn.Linear(2, 2).state_dict(),
    }
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"format": FORMAT, "networks": states, "prediction": spec.to_json()}, path)
    trained = read_trained_networks(path)
    assert set(trained.networks) == {"network", "network_refine"}
    predictor = Predictor.from_state_dicts(
        trained.spec, [trained.networks], plan, schema, Window.of(plan, mirror=False), "cpu"
    )
    image = np.random.default_rng(0).normal(size=(1, 1, 16, 16)).astype(np.float32)
    with torch.no_grad():
        logits, features = decode(network, encode(network, torch.from_numpy(image[:, 0])[None]))
        expected = head(features[-1], logits[0])[0]
    found = torch.as_tensor(predictor.logits(image))[:, 0]
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)
    del states["network_refine"]
    torch.save({"format": FORMAT, "networks": states, "prediction": spec.to_json()}, path)
    with pytest.raises(InvalidInput, match="network_refine"):
        read_trained_networks(path)
