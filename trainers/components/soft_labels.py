"""Learning soft labels: another network's probabilities as targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from autossl.trainers.components.losses import masked_bce, soft_dice


def soft_label_loss(z: Tensor, q: Tensor, valid: Tensor, regions: bool = False, dice_weight: float = 1.0) -> Tensor:
    """Cross-entropy + dice_weight·(1 - soft Dice over the foreground), at full resolution, over the valid voxels.

    Args:
        z: logits [N, C, *S].
        q: target probabilities [N, C, *S]; no gradient flows through them.
        valid: boolean [N, 1, *S].
        regions: z are logits of sigmoids; the cross-entropy is binary and averaged over the regions.
        dice_weight: of the Dice part.
    """
    z, q = z.float(), q.detach().float()
    if regions:
        cross_entropy, p, classes = masked_bce(z, q, valid), torch.sigmoid(z), range(z.shape[1])
    else:
        voxels = -(q * functional.log_softmax(z, 1)).sum(1, keepdim=True)
        cross_entropy = torch.where(valid, voxels, 0).sum() / valid.sum().clamp(min=1)
        p, classes = torch.softmax(z, 1), range(1, z.shape[1])
    return cross_entropy + dice_weight * (1 - soft_dice(p, q, valid, classes=classes).mean())
