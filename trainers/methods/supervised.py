"""The twin: what the labeled cases alone are worth, with everything else equal."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from autossl.data.channels import Channels
from autossl.data.problems import InvalidInput, Problem
from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import (
    Batch,
    BatchRequest,
    Job,
    MethodSettings,
    Parts,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamRequest,
    setting,
)


class SupervisedSettings(MethodSettings):
    """What can be changed with --set."""

    channels: str | None = setting(
        None,
        "image channels that the network sees, by name or number, as FLAIR or 0+1; None: all",
        "ours: the twin of a network that sees one modality",
    )

    @field_validator("channels", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value


class Supervised(SemiSupervisedTrainer):
    """nnU-Net's training on the labeled cases: Dice and cross-entropy at every level of deep supervision."""

    name = "supervised"
    title = "Supervised training on the labeled cases alone"
    citation = (
        "F. Isensee, P. F. Jaeger, S. A. A. Kohl, J. Petersen, K. H. Maier-Hein. nnU-Net: a self-configuring method "
        "for deep learning-based biomedical image segmentation. Nature Methods 18, 2021."
    )
    Settings = SupervisedSettings
    reduces_to_supervised = True

    @classmethod
    def refusals(cls, job: Job, settings: MethodSettings) -> list[Problem]:
        try:
            _channels_of(job, settings)
        except InvalidInput as error:
            return list(error.problems)
        return []

    def build(self) -> Parts:
        self.channels = _channels_of(self.job, self.settings)
        seen = None if self.channels is None else len(self.channels)
        return Parts(trained={"network": self.job.build_network(in_channels=seen)})

    def request(self, at: Progress) -> BatchRequest:
        labeled = StreamRequest(self.job.labeled_batch_size, sampler="foreground")
        return BatchRequest(labeled, StreamRequest(0))

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled = batch.labeled
        image = labeled.image if self.channels is None else labeled.image[:, list(self.channels)]
        z = self.parts.trained["network"](image)
        return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network", self.channels)


def _channels_of(job: Job, settings: MethodSettings) -> Channels | None:
    """Channel numbers; None where nothing is said of them, as by the plain settings that a comparison may pass."""
    named = settings.channels if isinstance(settings, SupervisedSettings) else None
    return None if named is None else job.channels.find(named)
