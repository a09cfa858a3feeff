"""What `autossl_predict` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from autossl.data.problems import InvalidInput, Problem
from autossl.data.runs import RunFilter
from autossl.inference.postprocess import Rule


@dataclass(frozen=True)
class PredictRequest:
    """What to predict, with what, where to. `dataset` with `run` names the model, or `model` does."""

    input: Path
    """Folder of images, named as in imagesTr."""
    output: Path
    dataset: str | None = None
    run: RunFilter = field(default_factory=RunFilter)
    """Which of the dataset's runs; exactly one must fit. Where this says no more than the split, the split's inference
    plan predicts (see `choose_inference_plan`)."""
    workspace: Path | None = None
    model: Path | None = None
    """The folder that holds fold_k, or results/DATASET/SPLIT with its inference plan, instead of a dataset."""
    folds: tuple[str, ...] | None = None
    """None: all finished integer folds, or those of the inference plan. Given, one run predicts."""
    modality: str | None = None
    """A channel or channel group of dataset.json to predict from alone; None: as deployed, all channels must be there.
    `input` needs its files only."""
    save_probabilities: bool = False
    save_uncertainty: bool = False
    """See `Restored.entropy` and `Restored.disagreement`."""
    postprocessing: tuple[Rule, ...] = ()
    """Applied to the label maps in this order, after the rules of an inference plan; probabilities and uncertainty
    stay as predicted."""
    mirroring: bool = True
    step_size: float = 0.5
    resume: bool = False
    """Skips cases whose results are complete."""
    overwrite: bool = False
    """Predicts again what is there."""
    num_parts: int = 1
    part_id: int = 0
    """Of the cases by name, each `num_parts`-th from this one on; for several machines with one output folder."""
    device: str = "auto"
    backend: str = "auto"
    """What computes the networks, one of `BACKENDS`; on `resume` auto stays with what the folder's record names."""


def check_request(request: PredictRequest) -> None:
    """Refuses what can be seen to be wrong before any file is opened.

    Raises:
        InvalidInput: with every fault.
    """
    problems = []
    if (request.dataset is None) == (request.model is None):
        found = "both a dataset and a model folder" if request.model else "neither a dataset nor a model folder"
        problems.append(Problem(found, "one of -d and --model", "name the trained run by one of them"))
    if request.model is not None and request.run != RunFilter():
        problems.append(
            Problem(f"--model beside {request.run}", "--model alone", "leave out the options that choose among runs")
        )
    if request.resume and request.overwrite:
        problems.append(Problem("--resume and --overwrite together", "one of them", "leave one out"))
    if request.num_parts < 1 or not 0 <= request.part_id < request.num_parts:
        found = f"part {request.part_id} of {request.num_parts}"
        problems.append(Problem(found, "a part from 0 to one less than their number", "correct --part_id"))
    if Path(request.input).resolve() == Path(request.output).resolve():
        fix = "choose another output folder"
        problems.append(
            Problem("results would be written among the images", "two folders", fix, file=Path(request.input))
        )
    if Path(request.output).is_file():
        problems.append(Problem("a file", "an output folder", "choose another", file=Path(request.output)))
    if problems:
        raise InvalidInput(problems)
