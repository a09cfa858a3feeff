"""Networks from plans: the real classes, seeded and forked initialization, nothing imported by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from autossl.data.problems import InvalidInput
from autossl.networks.build import build_network, other_kind, plain_twin, residual_twin, set_deep_supervision
from autossl.planners.plans import NETWORK_CLASSES, Architecture


def architecture(dims: int = 3, kind: str = "plain", anisotropic: bool = False, **changes: Any) -> Architecture:
    flat = [1, 2, 2] if anisotropic and dims == 3 else [2] * dims
    kernel = [1, 3, 3] if anisotropic and dims == 3 else [3] * dims
    kwargs: dict[str, Any] = {
        "n_stages": 3,
        "features_per_stage": [4, 8, 16],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [kernel, [3] * dims, [3] * dims],
        "strides": [[1] * dims, flat, [2] * dims],
        ("n_conv_per_stage" if kind == "plain" else "n_blocks_per_stage"): [1, 2, 2],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return Architecture(network_class_name=NETWORK_CLASSES[kind], arch_kwargs=kwargs | changes)


def test_state_dict_is_the_one_of_nnunets_class() -> None:
    ours = build_network(architecture(), 2, 3)
    theirs = PlainConvUNet(
        2, 3, [4, 8, 16], nn.Conv3d, 3, [1, 2, 2], [1, 2, 2], 3, [1, 1], True, nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, deep_supervision=True,
    )  # fmt: skip
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    first = build_network(architecture(), 1, 2, seed=7)
    assert torch.equal(torch.rand(1), expected_next)
    second = build_network(architecture(), 1, 2, seed=7)
    other = build_network(architecture(), 1, 2, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_weights_are_he_normal_with_zero_biases() -> None:
    network = build_network(architecture(features_per_stage=[16, 32, 64]), 1, 2, seed=0)
    convolution = next(m for m in network.modules() if isinstance(m, nn.Conv3d) and m.in_channels == 64)
    expected = math.sqrt(2 / (1 + 0.01**2) / (64 * 27))
    assert convolution.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert convolution.bias is not None
    assert convolution.bias.abs().max() == 0


def test_residual_blocks_start_as_identities() -> None:
    network = build_network(architecture(kind="resenc"), 1, 2, seed=0)
    last_norms = [m.conv2.norm for m in network.modules() if type(m).__name__ == "BasicBlockD"]
    assert last_norms
    assert all(norm.weight.abs().max() == 0 for norm in last_norms)


def test_deep_supervision_switches_without_touching_weights() -> None:
    network = build_network(architecture(dims=2), 1, 3, seed=0)
    image = torch.rand(1, 1, 16, 16)
    levels = network(image)
    assert [tuple(level.shape) for level in levels] == [(1, 3, 16, 16), (1, 3, 8, 8)]
    set_deep_supervision(network, False)
    assert torch.equal(network(image), levels[0])


def test_a_module_outside_the_table_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"os\.system"):
        build_network(architecture(nonlin="os.system"), 1, 2)


def test_an_argument_that_no_network_has_is_refused() -> None:
    with pytest.raises(InvalidInput, match="surprise"):
        build_network(architecture(surprise=1), 1, 2)


@pytest.mark.parametrize("dims", [2, 3])
def test_residual_twin_has_the_stages_of_the_plain_network(dims: int) -> None:
    plain = architecture(dims, anisotropic=True, n_conv_per_stage=[1, 2, 3])
    twin = residual_twin(plain)
    assert twin.network_class_name == NETWORK_CLASSES["resenc"]
    assert twin.arch_kwargs["n_blocks_per_stage"] == [1, 1, 2], "two convolutions make a block"
    same = ("n_stages", "features_per_stage", "strides", "kernel_sizes", "n_conv_per_stage_decoder")
    assert all(twin.arch_kwargs[key] == plain.arch_kwargs[key] for key in same)
    image = torch.rand(1, 1, *[16] * dims)
    levels = [build_network(kind, 1, 3, seed=0)(image) for kind in (plain, twin)]
    assert [z.shape for z in levels[0]] == [z.shape for z in levels[1]]
    assert "n_conv_per_stage" in plain.arch_kwargs, "the plain architecture stays as it was"


def test_residual_twin_of_one_number_for_all_stages_and_of_a_residual_network() -> None:
    twin = residual_twin(architecture(n_conv_per_stage=2))
    assert twin.arch_kwargs["n_blocks_per_stage"] == [1, 1, 1]
    assert residual_twin(twin) is twin


@pytest.mark.parametrize("dims", [2, 3])
def test_plain_twin_has_the_stages_of_the_residual_network(dims: int) -> None:
    residual = architecture(dims, "resenc", anisotropic=True, n_blocks_per_stage=[1, 3, 4])
    twin = plain_twin(residual)
    assert twin.network_class_name == NETWORK_CLASSES["plain"]
    assert twin.arch_kwargs["n_conv_per_stage"] == [2, 2, 2]
    same = ("n_stages", "features_per_stage", "strides", "kernel_sizes", "n_conv_per_stage_decoder")
    assert all(twin.arch_kwargs[key] == residual.arch_kwargs[key] for key in same)
    image = torch.rand(1, 1, *[16] * dims)
    levels = [build_network(kind, 1, 3, seed=0)(image) for kind in (residual, twin)]
    assert [z.shape for z in levels[0]] == [z.shape for z in levels[1]]
    assert plain_twin(twin) is twin


@pytest.mark.parametrize("kind", ["plain", "resenc"])
def test_the_other_kind_is_always_another_one(kind: str) -> None:
    own = architecture(kind=kind)
    assert {own.network_class_name, other_kind(own).network_class_name} == set(NETWORK_CLASSES.values())
