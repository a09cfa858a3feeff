"""Small plans, jobs and batches that many tests use."""

from __future__ import annotations

from typing import Any

import torch

from autossl.data.labels import LabelSchema
from autossl.networks.build import build_network
from autossl.planners.plans import NETWORK_CLASSES, Architecture, ConfigurationPlan
from autossl.trainers.base import Batch, Job, StreamBatch, derive_seed
from autossl.trainers.components.losses import SupervisedLoss

torch.set_num_threads(1)


def toy_architecture(
    dims: int,
    features: tuple[int, ...] = (4, 8),
    anisotropic: bool = False,
    strides: tuple[tuple[int, ...], ...] | None = None,
) -> Architecture:
    """A plain U-Net with one stage per entry of `features`; `strides` (after the first stage) go before the rest."""
    stride = [1, 2, 2] if anisotropic and dims == 3 else [2] * dims
    later = [list(entry) for entry in strides] if strides is not None else [stride] * (len(features) - 1)
    kernel = [1, 3, 3] if anisotropic and dims == 3 else [3] * dims
    return Architecture(
        network_class_name=NETWORK_CLASSES["plain"],
        arch_kwargs={
            "n_stages": len(features),
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [kernel] + [[3] * dims] * (len(features) - 1),
            "strides": [[1] * dims, *later],
            "n_conv_per_stage": [1] * len(features),
            "n_conv_per_stage_decoder": [1] * (len(features) - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
    )


def toy_configuration(dims: int = 2, n_channels: int = 1, **changes: Any) -> ConfigurationPlan:
    """A configuration whose patch is 16 per axis (three stages, so that deep supervision has two levels)."""
    values: dict[str, Any] = {
        "data_identifier": "toy",
        "batch_size": 2,
        "patch_size": (16,) * dims,
        "median_image_size_in_voxels": (16.0,) * dims,
        "spacing": (1.0,) * dims,
        "normalization_schemes": ("ZScoreNormalization",) * n_channels,
        "use_mask_for_norm": (False,) * n_channels,
        "architecture": toy_architecture(dims, (4, 8, 8)),
        "batch_dice": False,
        "mirror_axes": tuple(range(dims)),
        "labeled_batch_size": 2,
        "unlabeled_batch_size": 2,
    }
    return ConfigurationPlan(**{**values, **changes})


def toy_schema(n_classes: int = 2, regions: bool = False, ignore: bool = False) -> LabelSchema:
    """Background and classes 1.., or two nested regions; with an ignore label where asked."""
    names: dict[str, tuple[int, ...]] = {"background": (0,)}
    if regions:
        names |= {"whole": (1, 2), "core": (2,)}
    else:
        names |= {f"class {value}": (value,) for value in range(1, n_classes + 1)}
    if ignore:
        names["ignore"] = (3 if regions else n_classes + 1,)
    return LabelSchema(names, (1, 2) if regions else None)


def toy_job(dims: int = 2, n_unlabeled: int = 4, total_steps: int = 100, **options: Any) -> Job:
    """A job with the toy configuration; `options`: schema, configuration, seed."""
    schema = options.get("schema", toy_schema())
    configuration = options.get("configuration", toy_configuration(dims))

    def builder(seed: int, **changes: Any) -> torch.nn.Module:
        architecture = changes.get("architecture") or configuration.architecture
        channels, outputs = changes.get("in_channels"), changes.get("out_channels")
        return build_network(architecture, channels or configuration.n_channels, outputs or schema.n_outputs, seed=seed)

    return Job(
        configuration=configuration,
        schema=schema,
        n_labeled=4,
        n_unlabeled=n_unlabeled,
        total_steps=total_steps,
        seed=options.get("seed", 0),
        labeled_batch_size=configuration.labeled_batch_size,
        unlabeled_batch_size=configuration.unlabeled_batch_size,
        ema_decay_max=0.99,
        warm_up_fraction=0.02,
        channel_std=(1.0,) * configuration.n_channels,
        supervised_loss=SupervisedLoss(
            regions=schema.has_regions, batch_dice=configuration.batch_dice, has_ignore=schema.ignore_label is not None
        ),
        network_builder=builder,
    )


def toy_stream(
    job: Job, count: int, seed: int, labeled: bool, views: int = 1, with_target: bool | None = None
) -> StreamBatch:
    """Smooth random patches; the label is where the image is bright, so that there is something to learn.

    `with_target` gives an unlabeled stream the labels that it would have, or takes them from a labeled one.
    """
    generator = torch.Generator().manual_seed(derive_seed("toy", seed, int(labeled)))
    size = job.configuration.patch_size
    coarse = torch.randn(count, job.configuration.n_channels, *[4] * len(size), generator=generator)
    mode = "bilinear" if len(size) == 2 else "trilinear"
    image = torch.nn.functional.interpolate(coarse, size=size, mode=mode)
    level = image[:, :1]
    if job.schema.has_regions:
        target = torch.cat([level > 0.2, level > 0.8], 1).float()
    else:
        target = (level > 0.2).long() + (level > 0.8).long()
    noisy = tuple(image + 0.1 * torch.randn(image.shape, generator=generator) for _ in range(views))
    valid = torch.ones_like(level, dtype=torch.bool)
    return StreamBatch(
        views=noisy,
        valids=(valid,) * views,
        case_ids=tuple(f"case {index}" for index in range(count)),
        centers=torch.full((count, 3), 0.5),
        targets=(target,) * views if (labeled if with_target is None else with_target) else None,
    )


def toy_batch(job: Job, seed: int = 0, n_labeled: int = 2, n_unlabeled: int = 2) -> Batch:
    """One step's batch."""
    unlabeled = toy_stream(job, n_unlabeled, seed, labeled=False) if n_unlabeled else None
    return Batch(toy_stream(job, n_labeled, seed, labeled=True), unlabeled)
