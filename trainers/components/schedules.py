"""Weights of loss terms as functions of the progress r in [0, 1]."""

from __future__ import annotations

import math


def sigmoid_ramp(r: float, r_end: float = 1.0) -> float:
    """exp(-5·(1 - min(r / r_end, 1))²): 0.0067 at 0, 1 from r_end on; r_end = 0 gives 1.

    Source: Laine and Aila, Temporal Ensembling, ICLR 2017.
    """
    if r_end <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(r / r_end, 1.0)) ** 2)


def linear_ramp(r: float, r_0: float, r_1: float, v_0: float = 0.0, v_1: float = 1.0) -> float:
    """v_0 until r_0, v_1 from r_1 on, a straight line between."""
    if r >= r_1:
        return v_1
    if r <= r_0:
        return v_0
    return v_0 + (v_1 - v_0) * (r - r_0) / (r_1 - r_0)
