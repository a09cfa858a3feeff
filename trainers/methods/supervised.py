"""The twin: what the labeled cases alone are worth, with everything else equal."""

from __future__ import annotations

from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import (
    Batch,
    BatchRequest,
    MethodSettings,
    Parts,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamRequest,
)


class Supervised(SemiSupervisedTrainer):
    """nnU-Net's training on the labeled cases: Dice and cross-entropy at every level of deep supervision."""

    name = "supervised"
    title = "Supervised training on the labeled cases alone"
    citation = (
        "F. Isensee, P. F. Jaeger, S. A. A. Kohl, J. Petersen, K. H. Maier-Hein. nnU-Net: a self-configuring method "
        "for deep learning-based biomedical image segmentation. Nature Methods 18, 2021."
    )
    Settings = MethodSettings
    reduces_to_supervised = True

    def build(self) -> Parts:
        return Parts(trained={"network": self.job.build_network()})

    def request(self, at: Progress) -> BatchRequest:
        labeled = StreamRequest(self.job.labeled_batch_size, sampler="foreground")
        return BatchRequest(labeled, StreamRequest(0))

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled = batch.labeled
        z = self.parts.trained["network"](labeled.image)
        return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network")
