"""How many loading workers memory allows, found before they are started: in a container /dev/shm is often 64 MB."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

from autossl.data.labels import LabelSchema
from autossl.data.memory import GIB, free_memory
from autossl.planners.plans import ConfigurationPlan
from autossl.trainers.base import BatchRequest, StreamRequest

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
AHEAD = 2
"""Batches that torch lets each worker make ahead."""
TAKEN = 2
"""Batches that were handed over and are still in use."""
WORKER_BYTES = 2**28
"""What a worker takes beside its batches, in round numbers."""
WORKING_COPIES = 4
"""Of its batch, while it is made: patches are larger before they are turned, and are copied by each transform."""
SHARE_OF_SHARED_MEMORY, SHARE_OF_MEMORY = 0.9, 0.5
"""The rest of the memory is for the training itself."""


def batch_bytes(
    plan: ConfigurationPlan, request: BatchRequest, schema: LabelSchema, signed_distance: bool = False
) -> int:
    """Bytes of the images and maps of a batch.

    Args:
        plan: patch size and channels.
        request: of the step.
        schema: labels or regions.
        signed_distance: whether distance maps of the labeled targets come along.
    """
    voxels, n_foreground = math.prod(plan.patch_size), len(schema.foreground)
    target = 4 * n_foreground if schema.has_regions else 8

    def per_voxel(stream: StreamRequest, maps: int) -> int:
        geometries = 1 if stream.shared_geometry else stream.views
        return stream.count * (4 * plan.n_channels * stream.views + geometries * (1 + maps))

    with_store = request.unlabeled.store is not None
    bytes_per_voxel = (
        per_voxel(request.labeled, target)
        + per_voxel(request.unlabeled, target + 4 if with_store else 0)
        + (4 * n_foreground * request.labeled.count if signed_distance else 0)
    )
    return voxels * bytes_per_voxel


def workers_that_fit(wanted: int, bytes_per_batch: int) -> int:
    """As many as wanted, or as shared memory and memory allow; a warning says what to do. 0 needs neither.

    The number decides speed alone: batches are the same bits for any.
    """
    if wanted == 0:
        return 0
    free = free_memory()
    per_worker = WORKER_BYTES + (AHEAD + WORKING_COPIES) * bytes_per_batch
    fitting = min(wanted, int(SHARE_OF_MEMORY * free / per_worker))
    if fitting < wanted:
        logger.warning(
            "%d loading workers instead of %d: each takes about %.2f GiB, and %.2f GiB of memory are free. What to do: "
            "free memory for more speed, or accept it with --num_workers %d",
            *(fitting, wanted, per_worker / GIB, free / GIB, fitting),
        )
    return min(fitting, _by_shared_memory(fitting, bytes_per_batch))


def _by_shared_memory(wanted: int, bytes_per_batch: int) -> int:
    if not SHARED_MEMORY.is_dir():  # other systems share memory in other ways
        return wanted
    free = shutil.disk_usage(SHARED_MEMORY).free
    fitting = int((SHARE_OF_SHARED_MEMORY * free / bytes_per_batch - TAKEN) / AHEAD) if bytes_per_batch else wanted
    fitting = max(0, min(wanted, fitting))
    if fitting < wanted:
        needed = (AHEAD * wanted + TAKEN) * bytes_per_batch / SHARE_OF_SHARED_MEMORY
        logger.warning(
            "%d loading workers instead of %d: %s has %.0f MiB free, and their batches need %.0f MiB. What to do: give "
            "the container more for more speed (docker run --shm-size=%dg, or --ipc=host), or accept it with "
            "--num_workers %d",
            *(fitting, wanted, SHARED_MEMORY, free / 2**20, needed / 2**20, math.ceil(needed / GIB), fitting),
        )
    return fitting
