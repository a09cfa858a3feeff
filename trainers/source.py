"""The loop's source of batches: the fold's streams, and the pseudo-labels of the last refresh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autossl.data.labels import LabelSchema
from autossl.planners.plans import ConfigurationPlan
from autossl.trainers.base import BatchRequest
from autossl.trainers.batches import BatchIterator, BatchMaker, Streams, UnlabeledCase, batch_iterator
from autossl.trainers.pseudo_labels import PseudoLabelStore
from autossl.trainers.worker_count import batch_bytes, workers_that_fit


@dataclass
class FoldSource:
    """Makes the batches of a fold. It knows the paths of what the fold may see, and of nothing else."""

    streams: Streams
    configuration: ConfigurationPlan
    schema: LabelSchema
    seed: int
    store_folder: Path
    """Pseudo-label stores lie in its subfolders."""
    num_workers: int = 0
    pin_memory: bool = False
    signed_distance: bool = False

    def batches(self, steps: Sequence[tuple[int, BatchRequest]]) -> BatchIterator:
        """One batch per step; close it to end its workers, which are no more than memory allows."""
        maker = BatchMaker(
            self.streams, self.configuration, self.schema, self.seed, signed_distance=self.signed_distance
        )
        largest = max(
            (
                batch_bytes(self.configuration, request, self.schema, self.signed_distance)
                for request in {request for _, request in steps}
            ),
            default=0,
        )
        return batch_iterator(maker, steps, workers_that_fit(self.num_workers, largest), self.pin_memory)

    def reload_store(self, store: str, step: int) -> None:
        """From now on patches of the cases that the version of `step` uses come with it; it offers no others."""
        versions = PseudoLabelStore(self.store_folder / store)
        weights = versions.weights(step)

        def renewed(case: UnlabeledCase) -> UnlabeledCase:
            stores = {name: paths for name, paths in case.stores.items() if name != store}
            if case.id not in weights:  # a version of before may have used it
                return replace(case, stores=stores)
            stores[store] = versions.paths(step, case.id)
            return replace(case, stores=stores, store_weights={**case.store_weights, store: weights[case.id]})

        unlabeled = tuple(renewed(case) for case in self.streams.unlabeled)
        self.streams = replace(self.streams, unlabeled=unlabeled, filled=self.streams.filled | {store})
