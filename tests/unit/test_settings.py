"""Settings that cannot be stop the start with a sentence that names them."""

from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.jobs.presets import DEFAULT_MODEL_NAME, JobType
from serve_app.settings import Settings
from serve_app.up import sentences


def made(**values: Any) -> Settings:
    return Settings.model_validate({"store_url": "redis://unused"} | values)


def test_without_any_there_is_one_model_for_all_job_types() -> None:
    settings = made()
    assert {settings.model_of(job_type) for job_type in JobType} == {DEFAULT_MODEL_NAME}
    assert settings.generator_name(DEFAULT_MODEL_NAME) == "Generator"


def test_the_default_model_keeps_its_deployment_when_another_joins() -> None:
    settings = made(
        models={"wan-14b": {"architecture": "14B"}, "wan-1.3b": {}}, job_types={"video_high": {"model": "wan-14b"}}
    )
    assert [settings.generator_name(model) for model in settings.models] == ["Generator-wan-14b", "Generator"]
    assert settings.model_of(JobType.VIDEO_HIGH) == "wan-14b"
    assert settings.model_of(JobType.IMAGE_FAST) == "wan-1.3b"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"models": {}}, ["models"]),
        ({"models": {"Wan 14B": {}}}, ["'Wan 14B'"]),
        ({"models": {"wan": {}}}, ["default_model", "'wan-1.3b'", "wan"]),
        ({"models": {"wan": {"reference_card": "RTX 9999"}}}, ["reference_card", "RTX 9999", "RTX 4090"]),
        ({"models": {"wan": {"architecture": "2B"}}}, ["architecture", "2B", "14B"]),
        ({"models": {"wan": {"sources": "x"}}}, ["unknown setting", "models.wan.sources"]),
        ({"job_types": {"video_high": {"model": "other"}}}, ["video_high", "'other'", "wan-1.3b"]),
        ({"job_types": {"video_tall": {}}}, ["video_tall"]),
        ({"job_types": {"video_high": {"profile": "turbo"}}}, ["profile", "turbo"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(values: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ValidationError) as refusal:
        made(**values)
    said = sentences(refusal.value)
    assert all(name in said for name in names), said
