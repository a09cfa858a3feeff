"""The prediction vocabulary: through JSON and back, what it refuses, and its closed forms."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from autossl.data.problems import InvalidInput
from autossl.networks.prediction import Member, PredictionSpec, build_member, logits_of, probabilities_of
from autossl.planners.plans import NETWORK_CLASSES, Architecture


def flat_architecture(dims: int = 2) -> Architecture:
    kwargs: dict[str, Any] = {
        "n_stages": 2,
        "features_per_stage": [2, 4],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [[3] * dims, [3] * dims],
        "strides": [[1] * dims, [2] * dims],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return Architecture(network_class_name=NETWORK_CLASSES["plain"], arch_kwargs=kwargs)


def two_networks() -> PredictionSpec:
    return PredictionSpec(
        members=(
            Member(name="flair", architecture=flat_architecture(), channels=(1,)),
            Member(name="both", architecture=flat_architecture()),
        ),
        combine="mean_probabilities",
    )


def test_json_and_back_is_the_same() -> None:
    spec = two_networks()
    assert PredictionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"activation": "exec"}, "activation"),
        ({"combine": "single"}, "single"),
        ({"members": []}, "members"),
        ({"module": "os"}, "module"),
    ],
)
def test_foreign_words_are_refused_with_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        PredictionSpec.from_json(two_networks().to_json() | changes)


def test_members_must_agree_on_dimensions_and_differ_in_name() -> None:
    flat = Member(name="a", architecture=flat_architecture(2))
    with pytest.raises(ValueError, match="2D or 3D"):
        PredictionSpec(
            members=(flat, Member(name="b", architecture=flat_architecture(3))), combine="mean_probabilities"
        )
    with pytest.raises(ValueError, match="distinct names"):
        PredictionSpec(members=(flat, flat), combine="mean_probabilities")


def test_a_member_sees_its_channels_only() -> None:
    spec = two_networks()
    network = build_member(spec.members[0], n_channels=2, n_outputs=3)
    assert network(torch.rand(1, 1, 8, 8)).shape == (1, 3, 8, 8)
    assert not network.training
    with pytest.raises(InvalidInput, match="channel 1"):
        build_member(spec.members[0], n_channels=1, n_outputs=3)


def test_dirichlet_probabilities_are_alpha_over_its_sum() -> None:
    logits = torch.tensor([[0.0, math.log(2)]])  # evidence 1 and 2
    expected = torch.tensor([[2.0, 3.0]])
    torch.testing.assert_close(probabilities_of(logits, "dirichlet"), expected / expected.sum())


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "dirichlet"])
def test_logits_of_a_mean_give_the_mean_back(activation: Any) -> None:
    spec = two_networks().model_copy(update={"activation": activation})
    mean = probabilities_of(torch.randn(4, 3, 5), activation)
    back = probabilities_of(logits_of(mean, activation), spec.output_activation)
    torch.testing.assert_close(back, mean, rtol=1e-5, atol=1e-6)
