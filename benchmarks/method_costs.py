"""What a step of each method costs relative to `supervised` on the same B_l labeled patches, and what is machinery.

Steps go through the training loop (zeroing gradients, backward pass, clipping, optimizer, `after_step`), on batches of
the fold's own cases that were made beforehand: the loader is measured by `loading.py`. All methods are timed in one
run, one step of each after the other, round by round, so that a busy moment hits all alike. A method with phases counts
each by its share of the run, in its middle; predicting a pool of unlabeled cases (self_training) is no step and left
out.

- *time factor*: a step / a supervised step of the same round; median over rounds.
- *machinery factor*: a step / its bare passes, the forward and backward passes of the networks that it calls, repeated
  alone on random input of the same shapes right after it; median over rounds.
- *memory factor*: what autograd keeps at most (each storage once) + weights, gradients, momentum, followers and
  memories, over the same of `supervised`; counted, not measured, so that it holds for any device.

    python benchmarks/method_costs.py --workspace W --dataset 4 --configuration 2d --labeled 8 \\
        -o benchmarks/results/method_costs.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from autossl.trainers.base import Batch, Progress
from autossl.trainers.loop import LoopOptions, TrainingLoop
from autossl.trainers.memory_trial import StepBytes, step_bytes
from autossl.trainers.phases import Span
from autossl.trainers.refresh import blank_pseudo_labels
from autossl.trainers.registry import all_methods
from autossl.trainers.setup import RunSetup, TrainRequest, resolve
from autossl.trainers.source import FoldSource
from autossl.version import __version__

TWIN = "supervised"
TOTAL_STEPS = 1000
"""Length of the run whose phases are measured."""
BATCHES = 2
"""Made beforehand for each phase, used in turn."""


@dataclass(frozen=True)
class Pass:
    """One call of a network, or of a part of one."""

    module: nn.Module
    inputs: tuple[Any, ...]
    with_gradient: bool

    def repeat(self) -> None:
        """The forward pass, and the backward pass where the step had one."""
        for value in self.inputs:
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, Tensor):
                    tensor.grad = None
        with torch.set_grad_enabled(self.with_gradient):
            found = self.module(*self.inputs)
        outputs = [level for level in (found if isinstance(found, list | tuple) else [found]) if level.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(level) for level in outputs])


@contextmanager
def recorded_passes(passes: list[Pass]) -> Iterator[None]:
    """Collects the outermost module calls while it is open, with random input of the same shapes."""
    depth = 0

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            passes.append(Pass(module, tuple(map(_alike, inputs)), torch.is_grad_enabled()))

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(before),
        nn.modules.module.register_module_forward_hook(after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _alike(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_alike(entry) for entry in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn_like(value.detach()).requires_grad_(value.requires_grad)
    return value


@dataclass
class PhaseCost:
    """One phase of a method, ready to be timed."""

    method: str
    phase: str
    share: float
    loop: TrainingLoop
    steps: list[tuple[Progress, Batch]]
    memory: StepBytes
    passes: list[Pass]
    step_s: list[float] = field(default_factory=list)
    bare_s: list[float] = field(default_factory=list)
    step_cpu_s: list[float] = field(default_factory=list)
    bare_cpu_s: list[float] = field(default_factory=list)

    def measure(self, round_index: int, device: str) -> None:
        """One step through the loop, then its bare passes."""
        at, batch = self.steps[round_index % len(self.steps)]
        for call, wall, cpu in (
            (lambda: self.loop._train_step(batch, at), self.step_s, self.step_cpu_s),
            (self._bare, self.bare_s, self.bare_cpu_s),
        ):
            elapsed, used = timed(call, device)
            wall.append(elapsed)
            cpu.append(used)

    def _bare(self) -> None:
        for module in self.loop.method.parts.trained.values():
            module.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.float16, enabled=self.loop.options.device.startswith("cuda")):
            for entry in self.passes:
                entry.repeat()


def timed(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """Wall and CPU seconds."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def prepared(setup: RunSetup, fold: str, folder: Path) -> list[PhaseCost]:
    """The phases of a method; each has a loop of its own that went through the phases before it."""
    costs: list[PhaseCost] = []
    n_phases = len(setup.method(setup.job(fold, TOTAL_STEPS), setup.settings).phases())
    for index in range(n_phases):
        source = FoldSource(
            setup.streams(fold),
            setup.configuration,
            setup.schema,
            setup.request.seed,
            folder / f"{setup.method.name}_{index}",
            signed_distance=setup.method.needs.signed_distance,
        )
        source.store_folder.mkdir(parents=True)
        options = LoopOptions(TOTAL_STEPS, setup.device, seed=setup.request.seed, gradient_share_every=0)
        method = setup.method(setup.job(fold, TOTAL_STEPS), setup.settings)
        loop = TrainingLoop(method, source, source.store_folder, options, refresh=blank_pseudo_labels(source))
        for span in loop.timetable.spans[: index + 1]:
            loop.step = span.start
            loop._refresh_and_enter_phase()
        costs.append(_phase_cost(loop, source, loop.timetable.spans[index]))
    return costs


def _phase_cost(loop: TrainingLoop, source: FoldSource, span: Span) -> PhaseCost:
    middle = (span.start + span.end) // 2
    loop.step = middle
    loop._refresh_and_enter_phase()
    points = [loop.timetable.progress(step) for step in range(middle, min(middle + BATCHES, span.end))]
    device = loop.options.device
    with closing(source.batches([(at.step, loop.method.request(at)) for at in points])) as batches:
        made = [batch.to(device) for batch in batches]
    memory = step_bytes(loop.method, made[0], points[0], device)
    passes: list[Pass] = []
    with recorded_passes(passes):
        loop._train_step(made[0], points[0])
    share = (span.end - span.start) / loop.options.total_steps
    return PhaseCost(
        loop.method.name, span.phase.name, share, loop, list(zip(points, made, strict=True)), memory, passes
    )


def figures(costs: list[PhaseCost], twin: PhaseCost) -> dict[str, Any]:
    """Of one method, its phases weighted by their shares."""
    rounds = range(len(twin.step_s))

    def of(name: str) -> list[float]:
        return [sum(cost.share * getattr(cost, name)[index] for cost in costs) for index in rounds]

    def ratio(above: list[float], below: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 4)

    memory = max(cost.memory.at(1) for cost in costs)
    return {
        "time_factor": ratio(of("step_s"), twin.step_s),
        "time_factor_cpu": ratio(of("step_cpu_s"), twin.step_cpu_s),
        "machinery_factor": ratio(of("step_s"), of("bare_s")),
        "machinery_factor_cpu": ratio(of("step_cpu_s"), of("bare_cpu_s")),
        "memory_factor": round(memory / twin.memory.at(1), 4),
        "step_ms": round(1000 * statistics.median(of("step_s")), 3),
        "bare_passes_ms": round(1000 * statistics.median(of("bare_s")), 3),
        "phases": [
            {
                "phase": cost.phase,
                "share": round(cost.share, 4),
                "step_ms": round(1000 * statistics.median(cost.step_s), 3),
                "bare_passes_ms": round(1000 * statistics.median(cost.bare_s), 3),
                "calls_with_gradient": sum(entry.with_gradient for entry in cost.passes),
                "calls_without": sum(not entry.with_gradient for entry in cost.passes),
                "kept_for_backward_mb": round(cost.memory.kept / 2**20, 3),
                "state_mb": round(cost.memory.state / 2**20, 3),
            }
            for cost in costs
        ],
    }


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """All methods side by side."""
    names = list(dict.fromkeys([TWIN, *(arguments.methods or all_methods())]))
    with TemporaryDirectory() as folder:
        costs: dict[str, list[PhaseCost]] = {}
        for name in names:
            request = TrainRequest(
                dataset=arguments.dataset,
                configuration=arguments.configuration,
                folds=(arguments.fold,),
                method=name,
                workspace=arguments.workspace,
                preset=arguments.preset,
                labeled=arguments.labeled,
                seed=arguments.seed,
                device=arguments.device,
            )
            setup = resolve(request)
            costs[name] = prepared(setup, arguments.fold, Path(folder))
            print(f"{name}: {len(costs[name])} phase(s) ready", flush=True)
        for index in range(-arguments.warm_up, arguments.rounds):
            for cost in (entry for entries in costs.values() for entry in entries):
                cost.measure(index, setup.device)
                if index < 0:
                    for times in (cost.step_s, cost.bare_s, cost.step_cpu_s, cost.bare_cpu_s):
                        times.clear()
    plan = setup.configuration
    return {
        "dataset": arguments.dataset,
        "configuration": arguments.configuration,
        "preset": arguments.preset,
        "labeled": arguments.labeled,
        "patch_size": list(plan.patch_size),
        "labeled_batch_size": plan.labeled_batch_size,
        "unlabeled_batch_size": plan.unlabeled_batch_size,
        "methods": {name: figures(entries, costs[TWIN][0]) for name, entries in costs.items()},
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--configuration", default="2d")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--labeled", metavar="N")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm_up", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    result = measured(arguments)
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result |= {
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "device": arguments.device,
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {"autossl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip(),
    }
    for name, entry in result["methods"].items():
        print(
            f"{name:<16} time × {entry['time_factor']:<7.2f} memory × {entry['memory_factor']:<7.2f} "
            f"machinery × {entry['machinery_factor']:.3f}   {entry['step_ms']:.1f} ms per step"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
