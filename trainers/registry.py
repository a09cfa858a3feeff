"""The methods by name: one visible dict, and what other packages add through the entry-point group."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from autossl.data.problems import InvalidInput, Problem, nearest
from autossl.trainers.base import MethodSettings, SemiSupervisedTrainer
from autossl.trainers.methods.bcp import BidirectionalCopyPaste
from autossl.trainers.methods.c3s3 import CompetitiveContrast
from autossl.trainers.methods.cad import CAD
from autossl.trainers.methods.cps import CPS
from autossl.trainers.methods.criinet import CRIINet
from autossl.trainers.methods.dtc import DualTaskConsistency
from autossl.trainers.methods.entropy_min import EntropyMinimization
from autossl.trainers.methods.ersr import EllipseRefinement
from autossl.trainers.methods.fixmatch import FixMatch
from autossl.trainers.methods.fsmifnet import SimilarityFusion
from autossl.trainers.methods.m3hl import MutualMaskMix
from autossl.trainers.methods.m_and_n import MAndN
from autossl.trainers.methods.mcl_cs import MultiscaleContrast
from autossl.trainers.methods.mcnet import MutualConsistency
from autossl.trainers.methods.mean_teacher import MeanTeacher
from autossl.trainers.methods.medl import MutualEvidential
from autossl.trainers.methods.self_training import SelfTraining
from autossl.trainers.methods.semi_cml import SemiCML
from autossl.trainers.methods.spcl import SelfPacedContrast
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.methods.transmedseg import TransMedSeg
from autossl.trainers.methods.uamt import UncertaintyAwareMeanTeacher
from autossl.trainers.methods.unimatch import UniMatch
from autossl.trainers.methods.urpc import PyramidConsistency

METHODS: dict[str, type[SemiSupervisedTrainer]] = {
    "supervised": Supervised,
    "entropy_min": EntropyMinimization,
    "mean_teacher": MeanTeacher,
    "uamt": UncertaintyAwareMeanTeacher,
    "urpc": PyramidConsistency,
    "dtc": DualTaskConsistency,
    "mcnet": MutualConsistency,
    "bcp": BidirectionalCopyPaste,
    "self_training": SelfTraining,
    "fixmatch": FixMatch,
    "unimatch": UniMatch,
    "cps": CPS,
    "fsmifnet": SimilarityFusion,
    "mcl_cs": MultiscaleContrast,
    "spcl": SelfPacedContrast,
    "m_and_n": MAndN,
    "ersr": EllipseRefinement,
    "m3hl": MutualMaskMix,
    "c3s3": CompetitiveContrast,
    "transmedseg": TransMedSeg,
    "medl": MutualEvidential,
    "cad": CAD,
    "semi_cml": SemiCML,
    "criinet": CRIINet,
}
ENTRY_POINT_GROUP = "autossl.methods"


def all_methods() -> dict[str, type[SemiSupervisedTrainer]]:
    """Our methods, then those of installed packages; a package cannot replace one of ours.

    Raises:
        InvalidInput: an installed package registers something that is no method, or takes a name of ours.
    """
    methods = dict(METHODS)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        found = entry.load()
        if not (isinstance(found, type) and issubclass(found, SemiSupervisedTrainer)) or entry.name in methods:
            raise InvalidInput(
                Problem(
                    f"entry point '{entry.name} = {entry.value}' is no method or takes a name that is in use",
                    "a subclass of SemiSupervisedTrainer under a new name",
                    "mend or uninstall the package that registers it",
                )
            )
        methods[entry.name] = found
    return methods


def method_class(name: str) -> type[SemiSupervisedTrainer]:
    """The named method; raises `InvalidInput` with the nearest names."""
    methods = all_methods()
    if name not in methods:
        raise InvalidInput(
            Problem(f"method '{name}' is unknown", f"one of {nearest(name, methods)}", "see autossl_methods")
        )
    return methods[name]


def make_settings(method: type[SemiSupervisedTrainer], given: dict[str, str]) -> MethodSettings:
    """The method's settings with the given values (text, as from --set); all problems are reported together."""
    fields = method.Settings.model_fields
    problems = [
        Problem(
            f"method '{method.name}' has no setting '{key}'",
            f"one of {nearest(key, fields)}",
            f"see autossl_methods {method.name}",
        )
        for key in given
        if key not in fields
    ]
    known: dict[str, Any] = {key: value for key, value in given.items() if key in fields}
    try:
        settings = method.Settings(**known)
    except ValidationError as error:
        problems += [
            Problem(
                f"--set {fault['loc'][0]}={known[str(fault['loc'][0])]}: {fault['msg'].removeprefix('Value error, ')}",
                f"a value for: {fields[str(fault['loc'][0])].description}",
                f"see autossl_methods {method.name}",
            )
            for fault in error.errors()
        ]
    if problems:
        raise InvalidInput(problems)
    return settings
