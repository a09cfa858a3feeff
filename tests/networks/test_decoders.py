"""Decoder variants and the distance head: shapes, sizes, closed forms, and prediction with several decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput
from autossl.inference.checkpoint import FORMAT, read_trained_networks
from autossl.inference.predictor import Predictor, Window
from autossl.networks.build import build_network
from autossl.networks.decoders import DecoderVariant, DistanceHead, Upsampling
from autossl.networks.features import decode, encode
from autossl.networks.prediction import Activation, Member, PredictionSpec, SharedDecoder
from autossl.planners.plans import NETWORK_CLASSES, Architecture
from toys import toy_architecture, toy_configuration, toy_schema

GEOMETRIES = {
    "2d": ((20, 12), ((2, 2), (2, 2))),
    "isotropic": ((12, 12, 20), ((2, 2, 2), (2, 2, 2))),
    "anisotropic": ((5, 12, 20), ((1, 2, 2), (1, 2, 2))),
}
"""Patch and strides; the deepest stage has odd sizes."""


def architecture_of(geometry: str, kind: str = "plain") -> Architecture:
    patch, strides = GEOMETRIES[geometry]
    plain = toy_architecture(len(patch), (4, 6, 8), geometry == "anisotropic", strides=strides)
    if kind == "plain":
        return plain
    kwargs = dict(plain.arch_kwargs)
    kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    return Architecture(network_class_name=NETWORK_CLASSES["resenc"], arch_kwargs=kwargs)


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("kind", ["plain", "resenc"])
@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_variants_answer_in_the_shapes_of_the_plans_decoder(geometry: str, kind: str) -> None:
    architecture = architecture_of(geometry, kind)
    network = build_network(architecture, 1, 3, seed=0)
    skips = encode(network, torch.rand(1, 1, *GEOMETRIES[geometry][0]))
    expected, _ = decode(network, skips)
    sizes = set()
    for upsampling in ("linear", "nearest"):
        all_levels = DecoderVariant(architecture, 3, upsampling, deep_supervision=True, seed=1)
        assert [z.shape for z in all_levels(skips)] == [z.shape for z in expected]
        one_level = DecoderVariant(architecture, 3, upsampling, seed=1)
        (z,) = one_level(skips)
        torch.testing.assert_close(z, all_levels(skips)[0])
        z.sum().backward(retain_graph=True)
        assert all(parameter.grad is not None for parameter in one_level.parameters())
        sizes.add(n_parameters(one_level))
    assert len(sizes) == 1


def test_variants_are_the_plans_stages_and_differ_in_their_upsampling_alone() -> None:
    architecture = architecture_of("2d")
    plan: Any = build_network(architecture, 1, 3)
    linear, nearest = (DecoderVariant(architecture, 3, kind, seed=4) for kind in ("linear", "nearest"))
    assert n_parameters(linear.stages) == n_parameters(plan.decoder.stages)
    nearest.load_state_dict(linear.state_dict())
    skips = encode(plan, torch.rand(1, 1, 20, 12))
    assert not torch.allclose(linear(skips)[0], nearest(skips)[0])


def test_in_2d_a_pointwise_convolution_comes_before_the_interpolation() -> None:
    up: Any = DecoderVariant(architecture_of("2d"), 3, "linear", seed=0).ups[0]
    below = torch.rand(1, 8, 5, 3)
    assert tuple(up.convolution.kernel_size) == (1, 1)
    expected = functional.interpolate(up.convolution(below), (10, 6), mode="bilinear", align_corners=True)
    torch.testing.assert_close(up(below, (10, 6)), expected)


def test_in_3d_the_finer_stages_kernel_comes_after_the_interpolation() -> None:
    up: Any = DecoderVariant(architecture_of("anisotropic"), 3, "nearest", seed=0).ups[-1]
    assert tuple(up.convolution.conv.kernel_size) == (1, 3, 3)
    below = torch.rand(1, 6, 5, 6, 10)
    repeated = below.repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(up(below, (5, 12, 20)), up.convolution(repeated))


def test_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, same, other = (DecoderVariant(architecture_of("2d"), 3, seed=seed) for seed in (1, 1, 2))
    heads = [DistanceHead(4, 2, 2, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b, c in ((first, same, other), heads):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
        assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


@pytest.mark.parametrize("dims", [2, 3])
def test_distance_head_is_a_pointwise_convolution_and_tanh(dims: int) -> None:
    head = DistanceHead(5, 3, dims, seed=0)
    assert n_parameters(head) == 3 * (5 + 1)
    features = torch.randn(2, 5, *[4] * dims)
    s = head(features)
    assert s.shape == (2, 3, *[4] * dims)
    by_hand = torch.einsum("fc,nc...->nf...", head.convolution.weight.flatten(1), features)
    by_hand = by_hand + head.convolution.bias.view(1, -1, *[1] * dims)  # type: ignore[union-attr]
    torch.testing.assert_close(s, torch.tanh(by_hand))
    torch.testing.assert_close(head(features, [2, 0]), s[:, [2, 0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert head(features).dtype == torch.float32


# --------------------------------------------------------------------------------------------------- deployed together


def deployed(kinds: tuple[Upsampling, ...], activation: Activation, deep_supervision: bool = False) -> PredictionSpec:
    decoders = tuple(SharedDecoder(name=kind, upsampling=kind, deep_supervision=deep_supervision) for kind in kinds)
    member = Member(name="network", architecture=architecture_of("2d"), decoders=decoders)
    return PredictionSpec(members=(member,), activation=activation, combine="mean_probabilities")


def mean_by_hand(network: nn.Module, decoders: list[DecoderVariant], image: Tensor, regions: bool) -> Tensor:
    """Mean probability over decoders and mirrored views."""
    total = torch.zeros(())
    for axes in ((), (2,), (3,), (2, 3)):
        skips = encode(network, image.flip(axes))
        for z in (decode(network, skips)[0][0], *(decoder(skips)[0] for decoder in decoders)):
            p = z.sigmoid() if regions else z.softmax(1)
            total = total + p.flip(axes) / (4 * (1 + len(decoders)))
    return total


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_a_predictor_averages_decoders_and_mirrored_views(regions: bool, deep_supervision: bool) -> None:
    schema: LabelSchema = toy_schema(regions=regions)
    spec = deployed(("linear", "nearest"), "sigmoid" if regions else "softmax", deep_supervision)
    network = build_network(architecture_of("2d"), 1, schema.n_outputs, seed=0)
    decoders = [
        DecoderVariant(architecture_of("2d"), schema.n_outputs, kind, deep_supervision, seed=seed)
        for seed, kind in enumerate(("linear", "nearest"), 1)
    ]
    states = {"network": network, "linear": decoders[0], "nearest": decoders[1]}
    weights = {name: module.state_dict() for name, module in states.items()}
    plan = toy_configuration(2, patch_size=(20, 12), architecture=architecture_of("2d"))
    predictor = Predictor.from_state_dicts(spec, [weights], plan, schema, Window((20, 12), (0, 1)))
    image = torch.randn(1, 1, 20, 12)
    logits = predictor.logits(image)[:, 0]
    p = logits.sigmoid() if regions else logits.softmax(0)
    with torch.no_grad():
        expected = mean_by_hand(network, decoders, image.transpose(0, 1), regions)[0]
    torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)

    del weights["nearest"]
    with pytest.raises(InvalidInput, match="no weights for network 'nearest'"):
        Predictor.from_state_dicts(spec, [weights], plan, schema)
    swapped = weights | {"nearest": weights["network"]}
    with pytest.raises(InvalidInput, match="the weights of 'nearest' do not fit"):
        Predictor.from_state_dicts(spec, [swapped], plan, schema)


def test_several_decoders_go_through_json_and_need_mean_probabilities() -> None:
    spec = deployed(("linear",), "softmax")
    assert PredictionSpec.from_json(spec.to_json()) == spec
    for changes, field in (
        ({"combine": "single"}, "several decoders"),
        ({"activation": "dirichlet"}, "several decoders"),
    ):
        with pytest.raises(InvalidInput, match=field):
            PredictionSpec.from_json(spec.to_json() | changes)
    content = spec.to_json()
    content["members"][0]["decoders"][0]["upsampling"] = "os.system"
    with pytest.raises(InvalidInput, match="upsampling"):
        PredictionSpec.from_json(content)
    content = spec.to_json()
    content["members"][0]["decoders"][0]["name"] = "network"
    with pytest.raises(InvalidInput, match="distinct names"):
        PredictionSpec.from_json(content)


def test_a_checkpoint_gives_the_weights_of_all_decoders(tmp_path: Path) -> None:
    weights = {"weight": torch.zeros(1)}
    networks = {"network": weights, "linear": weights, "nearest": weights, "other": weights}
    content = {
        "format": FORMAT,
        "networks": networks,
        "prediction": deployed(("linear", "nearest"), "softmax").to_json(),
    }
    torch.save(content, tmp_path / "whole.pth")
    assert list(read_trained_networks(tmp_path / "whole.pth").networks) == ["network", "linear", "nearest"]
    del networks["nearest"]
    torch.save(content, tmp_path / "part.pth")
    with pytest.raises(InvalidInput, match="no weights for network nearest"):
        read_trained_networks(tmp_path / "part.pth")
