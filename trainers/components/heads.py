"""Small heads on feature maps, used in training only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-6
"""Norms are at least this much, so that a vector of zeros stays one and its gradient finite."""


class Projector(nn.Module):
    """1×1 convolution → norm → activation → 1×1 convolution → L2 norm over the channels, in any number of dimensions.

    Maps [N, c_in, *S] become embeddings [N, c_out, *S]; sampled vectors [n, c_in] become [n, c_out] (without a norm
    layer only, since there is no image to take statistics from). The L2 norm is float32 also under autocast.

    Args:
        c_in: channels of the map.
        c_out: channels of the embedding.
        hidden: channels between the convolutions; None: c_in.
        norm: "instance" (affine), or None.
        act: "leaky_relu" (slope 0.01) or "prelu" (one learned slope).
        pool: "global": the map is averaged over space first, [N, c_in, *S] → [N, c_out] (no norm layer then);
            cells per axis: the embedding is averaged over a grid of so many cells before the L2 norm,
            [N, c_out, *cells]; None: not at all.
        seed: of the weights; the global generator is left as it was.

    Raises:
        ValueError: a norm layer together with global pooling, or vectors given to a projector with a norm layer.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int = 64,
        hidden: int | None = None,
        norm: Literal["instance"] | None = "instance",
        act: Literal["leaky_relu", "prelu"] = "leaky_relu",
        pool: Literal["global"] | Sequence[int] | None = None,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        if norm is not None and pool == "global":
            raise ValueError(f"norm={norm!r} with pool='global': one vector per image has no statistics; use norm=None")
        hidden = c_in if hidden is None else hidden
        self.pools_first = pool == "global"
        self.cells = None if pool is None or isinstance(pool, str) else tuple(pool)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(c_in, hidden)
            self.norm = nn.InstanceNorm1d(hidden, affine=True) if norm == "instance" else None
            self.act = nn.LeakyReLU(0.01) if act == "leaky_relu" else nn.PReLU()
            self.last = nn.Linear(hidden, c_out)

    def forward(self, f: Tensor) -> Tensor:
        """Unit vectors along axis 1, float32."""
        if self.pools_first and f.ndim > 2:
            f = f.float().flatten(2).mean(2)
        if f.ndim == 2:
            if self.norm is not None:
                raise ValueError(
                    f"vectors of shape {tuple(f.shape)} in a projector with a norm layer: expected a map [N, c, *S]; "
                    "project the map before sampling, or build the projector with norm=None"
                )
            return _unit(self.last(self.act(self.first(f))))
        size = f.shape[2:]
        e = self._project(f.flatten(2)).unflatten(2, size)
        if self.cells is not None:
            pooled: Any = functional.adaptive_avg_pool2d if len(size) == 2 else functional.adaptive_avg_pool3d
            e = pooled(e.float(), self.cells)
        return _unit(e)

    def _project(self, f: Tensor) -> Tensor:
        """[N, c_in, V] → [N, c_out, V]."""
        f = functional.conv1d(f, self.first.weight[..., None], self.first.bias)
        f = self.act(f if self.norm is None else self.norm(f))
        return functional.conv1d(f, self.last.weight[..., None], self.last.bias)


def _unit(e: Tensor) -> Tensor:
    return functional.normalize(e.float(), dim=1, eps=EPS)
