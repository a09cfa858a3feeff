"""oneDNN's convolutions give the values of PyTorch's own choice."""

from __future__ import annotations

import pytest
import torch

from autossl.networks.build import build_network
from autossl.networks.cpu import use_onednn
from toys import toy_architecture


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("n_images", [1, 2])
def test_values_stay_the_same(dims: int, n_images: int) -> None:
    architecture = toy_architecture(dims, (4, 8, 8), anisotropic=True)
    network = build_network(architecture, 2, 3, deep_supervision=False, seed=0).eval()
    images = torch.randn(n_images, 2, *[16] * dims)
    with torch.inference_mode():
        expected = network(images)
        assert use_onednn(network) is network
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def test_weights_are_still_those_of_the_module() -> None:
    network = use_onednn(build_network(toy_architecture(2), 1, 2, deep_supervision=False, seed=0).eval())
    image = torch.randn(1, 1, 16, 16)
    with torch.inference_mode():
        before = network(image)
        network.load_state_dict({key: value * 2 for key, value in network.state_dict().items()})
        assert not torch.allclose(network(image), before)
