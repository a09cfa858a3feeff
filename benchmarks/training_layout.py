"""What the memory layout of networks costs a training step on a CPU: channels first against channels last, in turn.

    python benchmarks/training_layout.py PLANS.json [-c 3d_fullres 2d] [--steps 6] [--repeats 3]
        [-o benchmarks/results/training_layout.json]

Forward and backward pass and the optimizer's step of the plan's network, on noise of the plan's patch and labeled
batch; no data are read. Both networks begin with the same weights; "largest_loss_difference" says how far apart their
losses are, as parts of the loss. Times are medians over all steps of all repetitions but the first step of each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from autossl.data.files import write_json
from autossl.data.provenance import Written
from autossl.networks.build import build_network
from autossl.networks.layers import to_channels_last
from autossl.planners.plans import ConfigurationPlan, read_plans

N_CLASSES = 3
LAYOUTS = ("channels_first", "channels_last")


def main() -> None:
    """Parses, times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path)
    parser.add_argument("-c", "--configurations", nargs="+", default=["3d_fullres", "2d"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/training_layout.json"))
    arguments = parser.parse_args()
    plans = read_plans(arguments.plans)
    content = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"rows": {}}
    content["written"] = Written.now().model_dump(mode="json")
    content["machine"] = {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    for name in arguments.configurations:
        found = measure(plans.configuration(name), arguments.steps, arguments.repeats)
        content["rows"][f"{plans.dataset_name} {name} {plans.preset}"] = found
        print(name, plans.preset, json.dumps(found), flush=True)
        write_json(arguments.output, content)


def measure(plan: ConfigurationPlan, steps: int, repeats: int) -> dict[str, Any]:
    """Median seconds of a step in both layouts, their ratio, and how far the losses are apart."""
    times: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    losses: dict[str, list[float]] = {}
    for index in range(repeats):
        for layout in LAYOUTS[:: 1 if index % 2 == 0 else -1]:
            gc.collect()
            took, losses[layout] = run(plan, layout, steps)
            times[layout] += took[1:]
    first, last = (median(times[layout]) for layout in LAYOUTS)
    apart = max(abs(a - b) / abs(a) for a, b in zip(*losses.values(), strict=True))
    seconds = dict(zip(LAYOUTS, (round(first, 4), round(last, 4)), strict=True))
    return {"seconds_per_step": seconds, "ratio": round(last / first, 3), "largest_loss_difference": apart}


def run(plan: ConfigurationPlan, layout: str, steps: int) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step."""
    network = build_network(plan.architecture, plan.n_channels, N_CLASSES, seed=0)
    if layout == "channels_last":
        to_channels_last(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(plan.labeled_batch_size, plan.n_channels, *plan.patch_size, generator=generator)
    label = torch.randint(N_CLASSES, (plan.labeled_batch_size, *plan.patch_size), generator=generator)
    took, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(network(x)[0], label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        took.append(time.perf_counter() - start)
        losses.append(loss.item())
    return took, losses


if __name__ == "__main__":
    main()
