"""The expected cross-entropy of a feature that varies as another domain does, in closed form: corrected logits.

Source: Li et al., Transferable Semantic Augmentation for Domain Adaptation, CVPR 2021, arXiv:2103.12562; the bound goes
back to Wang et al., Implicit Semantic Data Augmentation, NeurIPS 2019, arXiv:1909.12220.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from autossl.trainers.components.losses import connected_zero


def transferable_logits(z: Tensor, weight: Tensor, y: Tensor, shift: Tensor, cov: Tensor, strength: float) -> Tensor:
    """Logits whose cross-entropy bounds from above the expected one over f + N(strength·shift_y, strength·cov_y).

    z_c + s·(w_c - w_y)·shift_y + s/2·(w_c - w_y)ᵀ·cov_y·(w_c - w_y): Jensen's inequality takes the expectation into the
    logarithm, and the rest is the moment generating function of a Gaussian. The logit of y itself stays. Float32 also
    under autocast; gradients flow through z and the weights.

    Args:
        z: logits [n, C] of features f [n, A], w_c·f + b_c.
        weight: w of the linear layer behind the features, [C, A].
        y: classes, int64 [n].
        shift: how far the features of each class are moved, [C, A].
        cov: their covariance, [C, A, A], or its diagonal, [C, A].
        strength: s; 0 gives the logits back.
    """
    with torch.autocast(z.device.type, enabled=False):
        weight = weight.float()
        apart = weight[None] - weight[:, None]  # [y, c, A]
        moved = (apart * shift[:, None]).sum(-1)
        spread = (apart @ cov * apart).sum(-1) if cov.ndim == 3 else (apart.square() * cov[:, None]).sum(-1)
        correction = strength * (moved + 0.5 * spread.clamp(min=0))  # rounding may make a small one negative
        return z.float() + correction[y]


def class_balanced_ce(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits [n, C]: the mean within each class of y [n], then over the classes that are there.

    No row: 0 with a graph.
    """
    if not len(y):
        return connected_zero(z)
    members = functional.one_hot(y, z.shape[1]).float()
    sizes = members.sum(0)
    each = functional.cross_entropy(z.float(), y, reduction="none")
    per_class = (each[:, None] * members).sum(0) / sizes.clamp(min=1)  # no matrix product, which autocast would round
    return per_class.sum() / (sizes > 0).sum()
