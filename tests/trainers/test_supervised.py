"""The twin on some of the channels: the comparison for a network that sees one modality."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autossl.data.channels import ImageChannels
from autossl.trainers.base import MethodSettings, Progress
from autossl.trainers.methods.supervised import Supervised, SupervisedSettings
from autossl.trainers.registry import make_settings
from toys import toy_batch, toy_configuration, toy_job

JOB = replace(
    toy_job(configuration=toy_configuration(2, 3)),
    named_channels=ImageChannels(("T1pre", "FLAIR", "T1post"), {"T1": (0, 2)}),
)
AT = Progress(0, 10)


def test_without_the_setting_it_sees_all_and_is_what_it_was() -> None:
    plain, with_none = Supervised(JOB, MethodSettings()), Supervised(JOB, SupervisedSettings())
    reference = JOB.build_network().state_dict()
    for method in (plain, with_none):
        weights = method.parts.trained["network"].state_dict()
        assert all(torch.equal(weights[name], reference[name]) for name in reference)
        assert method.prediction() == JOB.single_network_prediction("network")
        assert method.prediction().members[0].channels is None
    batch = toy_batch(JOB)
    terms = [method.losses(batch, AT).losses["supervised"] for method in (plain, with_none)]
    z = JOB.build_network()(batch.labeled.image)
    expected = JOB.supervised_loss(z, batch.labeled.target, batch.labeled.valid)
    assert torch.equal(terms[0], expected)
    assert torch.equal(terms[1], expected)


@pytest.mark.parametrize("given, channels", [("FLAIR", (1,)), ("2", (2,)), ("T1", (0, 2)), ("2+FLAIR", (2, 1))])
def test_it_sees_its_channels_alone(given: str, channels: tuple[int, ...]) -> None:
    method = Supervised(JOB, make_settings(Supervised, {"channels": given}))
    batch = toy_batch(JOB)
    (term,) = method.losses(batch, AT).losses.values()
    z = method.parts.trained["network"](batch.labeled.image[:, list(channels)])
    assert torch.equal(term, JOB.supervised_loss(z, batch.labeled.target, batch.labeled.valid))
    assert method.prediction().members[0].channels == channels
    for channel in set(range(3)) - set(channels):
        batch.labeled.image[:, channel] = float("nan")
    assert torch.equal(method.losses(batch, AT).losses["supervised"], term)


def test_a_number_may_be_given_as_one() -> None:
    assert SupervisedSettings(channels=1).channels == "1"  # type: ignore[arg-type]


def test_unknown_channels_are_refused_before_any_work() -> None:
    (problem,) = Supervised.refusals(JOB, SupervisedSettings(channels="T2"))
    assert "'T2' is unknown" in problem.found
    assert Supervised.refusals(JOB, SupervisedSettings(channels="t1PRE")) == []
    assert Supervised.refusals(JOB, MethodSettings()) == []
