"""Names, settings and their error texts."""

from __future__ import annotations

import pytest

from autossl.data.problems import InvalidInput
from autossl.trainers.registry import METHODS, make_settings, method_class


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(InvalidInput, match="method 'mean_teachr' is unknown.*one of mean_teacher"):
        method_class("mean_teachr")


def test_settings_are_parsed_from_text() -> None:
    settings = make_settings(METHODS["mean_teacher"], {"lambda_max": "0.5", "student_noise": "1", "infer": "teacher"})
    assert (settings.lambda_max, settings.student_noise, settings.infer) == (0.5, True, "teacher")  # type: ignore[attr-defined]


def test_all_wrong_settings_are_reported_together() -> None:
    given = {"lambda": "1", "lambda_max": "-1", "infer": "both"}
    with pytest.raises(InvalidInput) as caught:
        make_settings(METHODS["mean_teacher"], given)
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "has no setting 'lambda'" in text
    assert "lambda_max" in text
    assert "--set lambda_max=-1: Input should be greater than or equal to 0" in text
    assert "--set infer=both" in text


def test_every_method_is_complete() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert len(method.__doc__ or "") > 80, f"{name}: the idea is its docstring"
        assert method.citation
        for key, field in method.Settings.model_fields.items():
            extra = field.json_schema_extra
            assert field.description, f"{name}.{key}"
            assert isinstance(extra, dict), f"{name}.{key}"
            assert extra["source"], f"{name}.{key}"
