"""How many loading workers memory and shared memory allow."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_store import TinyStore

from autossl.trainers import source, worker_count
from autossl.trainers.base import BatchRequest, StreamRequest
from autossl.trainers.batches import BatchMaker, Streams
from autossl.trainers.source import FoldSource
from autossl.trainers.worker_count import batch_bytes, workers_that_fit
from toys import toy_architecture, toy_configuration, toy_schema

PLAN = toy_configuration(3, 2, patch_size=(4, 8, 10), architecture=toy_architecture(3, (4,)))
MIB = 2**20


@pytest.fixture
def streams(tmp_path: Path) -> Streams:
    store, image = TinyStore(tmp_path), np.zeros((2, 6, 12, 12), np.float32)
    label = np.ones((6, 12, 12), np.uint8)
    return Streams((store.labeled("l", image, label),), (store.unlabeled("u", image),))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("regions", [True, False])
def test_the_bytes_of_a_batch_are_those_of_its_tensors(streams: Streams, shared: bool, regions: bool) -> None:
    schema = toy_schema(regions=regions)
    request = BatchRequest(StreamRequest(3, 2, shared), StreamRequest(2, 3, shared))
    batch = BatchMaker(streams, PLAN, schema, seed=0, signed_distance=True).make(0, request)
    found: dict[int, int] = {}
    for stream in (batch.labeled, batch.unlabeled):
        for value in vars(stream).values():
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.ndim == 5:
                    found[tensor.data_ptr()] = tensor.nbytes
    assert batch_bytes(PLAN, request, schema, signed_distance=True) == sum(found.values())


def test_maps_of_a_store_count(streams: Streams) -> None:
    plain, stored = (BatchRequest(StreamRequest(0), StreamRequest(2, store=store)) for store in (None, "s"))
    more = batch_bytes(PLAN, stored, toy_schema()) - batch_bytes(PLAN, plain, toy_schema())
    assert more == 2 * 4 * 8 * 10 * (8 + 4)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Memory and shared memory as told, in bytes."""

    def have(memory: int, shared: int) -> None:
        monkeypatch.setattr(worker_count, "free_memory", lambda: memory)
        monkeypatch.setattr(worker_count, "SHARED_MEMORY", tmp_path)
        monkeypatch.setattr(worker_count.shutil, "disk_usage", lambda path: SimpleNamespace(free=shared))

    return have


@pytest.mark.parametrize(
    ("shared", "fitting"),
    [(1000 * MIB, 4), (112 * MIB, 4), (111 * MIB, 3), (64 * MIB, 1), (44 * MIB, 0), (0, 0)],
)
def test_shared_memory_holds_all_batches_on_their_way(
    machine: Any, shared: int, fitting: int, caplog: pytest.LogCaptureFixture
) -> None:
    machine(2**40, shared)  # 4 workers have 8 batches of 10 MiB on their way, 2 are in use, and a tenth stays free
    assert workers_that_fit(4, 10 * MIB) == fitting
    if fitting < 4:
        assert f"{fitting} loading workers instead of 4" in caplog.text
        assert f"has {shared // MIB} MiB free, and their batches need 111 MiB" in caplog.text
        assert "--shm-size=1g" in caplog.text
        assert f"--num_workers {fitting}" in caplog.text
    else:
        assert caplog.text == ""


def test_memory_limits_workers_too(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine(2**30, 2**40)  # half of it is for workers that take 256 MiB and six batches each
    with caplog.at_level(logging.WARNING):
        assert workers_that_fit(8, 0) == 2
        assert workers_that_fit(8, 10 * MIB) == 1
        assert workers_that_fit(8, 100 * MIB) == 0
    assert "1 loading workers instead of 8: each takes about 0.31 GiB, and 1.00 GiB of memory are free" in caplog.text
    machine(0, 0)
    caplog.clear()
    assert workers_that_fit(0, 10 * MIB) == 0
    assert caplog.text == ""


def test_a_run_starts_with_the_workers_that_fit(
    streams: Streams, machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.setattr(source, "batch_iterator", lambda maker, steps, workers, pin: started.append(workers))
    fold = FoldSource(streams, PLAN, toy_schema(), seed=0, store_folder=tmp_path, num_workers=5)
    small, large = (BatchRequest(StreamRequest(count), StreamRequest(count)) for count in (1, 40))
    size = batch_bytes(PLAN, large, toy_schema())
    machine(2**40, 10 * size)
    fold.batches([(0, small), (1, large), (2, small)])
    machine(2**40, 2**40)
    fold.batches([(0, small), (1, large)])
    assert started == [3, 5]
