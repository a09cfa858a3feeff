"""How much of the gradient on the shared weights comes from the unsupervised terms: measured now and then, and logged.

No term should be there in name only. The measurement runs the backward pass of each term by itself before the ordinary
one, with the graph kept, and touches no `.grad`, so that a run has the same bits with it and without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

TOTAL = "total"
MEASUREMENTS = 50
"""About so many over a run, where it is long enough."""
MAX_COST = 0.02
"""Of the time of a run, unless that left fewer measurements than `FEWEST`."""
FEWEST, SHORTEST = 12, 16
"""Measurements, and steps between two of them: runs of a few steps go without."""
BACKWARD_SHARE = 2 / 3
"""Of a step that a backward pass takes, at most: it computes two products where the forward pass computes one."""


def measuring_interval(total_steps: int, n_terms: int) -> int:
    """Steps between two measurements: one backward pass for each unsupervised term, one for the supervised ones."""
    passes = 1 + n_terms + (n_terms > 1)
    affordable = math.ceil(passes * BACKWARD_SHARE / MAX_COST)
    return max(math.ceil(total_steps / MEASUREMENTS), min(affordable, max(SHORTEST, total_steps // FEWEST)), 1)


def gradient_shares(
    supervised: Sequence[Tensor],
    unsupervised: Mapping[str, Tensor],
    parameters: Sequence[nn.Parameter],
    scale: Callable[[Tensor], Tensor] = lambda term: term,
) -> dict[str, Tensor]:
    """|g| / (|g| + |g_s|) for each unsupervised term, and for all of them together as "total".

    g_s is the gradient of the supervised terms; norms are over the parameters that g_s reaches. A term of which
    nothing arrives there has share 0. Empty where no supervised term has a gradient, or no unsupervised one.

    Args:
        supervised: weighted terms with a graph.
        unsupervised: likewise, by name.
        parameters: those that may be trained now.
        scale: of the gradient scaler, so that float16 gradients do not vanish; shares do not depend on it.
    """
    if not supervised or not unsupervised:
        return {}

    def gradient(terms: Sequence[Tensor], of: Sequence[nn.Parameter]) -> list[Tensor | None]:
        total = scale(torch.stack([term.float() for term in terms]).sum())
        return list(torch.autograd.grad(total, of, retain_graph=True, allow_unused=True))

    reference = gradient(supervised, parameters)
    shared = [p for p, found in zip(parameters, reference, strict=True) if found is not None]
    if not shared:
        return {}
    size = _norm(reference)
    norms = {name: _norm(gradient([term], shared)) for name, term in unsupervised.items()}
    together = norms[next(iter(norms))] if len(norms) == 1 else _norm(gradient(list(unsupervised.values()), shared))
    return {name: norm / (norm + size).clamp(min=1e-30) for name, norm in {TOTAL: together, **norms}.items()}


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    found = [gradient.float() for gradient in gradients if gradient is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found))) if found else torch.zeros(())
