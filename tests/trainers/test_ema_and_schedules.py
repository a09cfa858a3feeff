"""EMA teacher and ramps against their closed forms."""

from __future__ import annotations

import pytest
import torch

from autossl.trainers.base import Progress, derive_seed
from autossl.trainers.components.augment import clipped_noise
from autossl.trainers.components.ema import EMATeacher, ema_decay
from autossl.trainers.components.schedules import linear_ramp, sigmoid_ramp


def student_with(value: float) -> torch.nn.Module:
    student = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(student.weight, value)
    student.register_buffer("counter", torch.tensor(value))
    return student


def test_teacher_is_the_average_of_all_students_so_far() -> None:
    teacher = EMATeacher(student_with(9.0), decay_max=0.99)
    averages = []
    for step, value in enumerate((1.0, 2.0, 6.0)):
        teacher.update(student_with(value), step)
        averages.append(teacher.network.weight.item())  # type: ignore[union-attr, operator]
    assert averages == pytest.approx([1.0, 1.5, 3.0])
    assert teacher.network.counter.item() == 6.0, "buffers are copied"  # type: ignore[union-attr, operator]
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert not teacher.network.training


def test_decay_is_capped_and_can_start_there() -> None:
    assert ema_decay(0, 0.9) == 0
    assert ema_decay(1, 0.9) == 0.5
    assert ema_decay(1000, 0.9) == 0.9
    assert ema_decay(0, 0.9, ramp_in=False) == 0.9
    teacher = EMATeacher(student_with(1.0), decay_max=0.9)
    teacher.update(student_with(2.0), 0, ramp_in=False)
    assert teacher.network.weight.item() == pytest.approx(1.1)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("r", "end", "value"), [(0, 1, 0.0067379), (0.5, 1, 0.2865048), (1, 1, 1), (1, 2.4, 0.18243), (0.3, 0, 1)]
)
def test_sigmoid_ramp(r: float, end: float, value: float) -> None:
    assert sigmoid_ramp(r, end) == pytest.approx(value, rel=1e-4)


def test_linear_ramp() -> None:
    assert [linear_ramp(r, 0.02, 0.10) for r in (0, 0.02, 0.06, 0.1, 1)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_noise_is_clipped_and_scaled_by_channel() -> None:
    x = torch.zeros(4, 2, 128, 128)
    noise = clipped_noise(x, torch.Generator().manual_seed(0), channel_std=(1.0, 3.0))
    first, second = noise[:, 0], noise[:, 1]
    assert first.abs().max() <= 0.2 + 1e-7
    assert first.mean().abs() < 2e-3
    assert first.std().item() == pytest.approx(0.0960, abs=1e-3)
    assert second.std().item() == pytest.approx(3 * 0.0960, abs=3e-3)


def test_draws_depend_on_seed_rank_stream_and_step_alone() -> None:
    base = Progress(step=3, total=10, seed=1)

    def draw(at: Progress, stream: str = "a") -> float:
        return torch.rand((), generator=at.generator(stream)).item()

    assert draw(base) == draw(Progress(step=3, total=99, seed=1, phase="other"))
    others = [draw(base, "b"), draw(Progress(4, 10, seed=1)), draw(Progress(3, 10, seed=2))]
    others.append(draw(Progress(3, 10, seed=1, rank=1)))
    assert len({draw(base), *others}) == 5
    assert derive_seed(0, "x") == derive_seed("0", "x")
    assert derive_seed(0, "x") != derive_seed(0, "x", 0)
