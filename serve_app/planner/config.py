"""What a Serve YAML file says of a model's cluster, for the planner: read as data, since Ray is not needed to plan."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from serve_app.errors import InvalidValue
from serve_app.jobs.presets import DEFAULT_MODEL_NAME
from serve_app.planner.plan import ClusterSettings
from serve_app.settings import ModelSettings, Settings


def read_config(path: Path, model: str | None) -> tuple[str, ModelSettings, dict[str, Any]]:
    """The model's name, its settings, and those of ClusterSettings that the file has. Raises InvalidValue.

    `model`: by its name in the file; None for the default one.
    """
    try:
        application = yaml.safe_load(path.read_text())["applications"][0]
        deployments = {one["name"]: one for one in application.get("deployments", ())}
        args = application.get("args") or {}
        models = args.get("models") or {DEFAULT_MODEL_NAME: {}}
    except (OSError, yaml.YAMLError) as error:
        raise InvalidValue(f"{path} cannot be read: {error}") from None
    except (TypeError, KeyError, IndexError, AttributeError):
        raise InvalidValue(f"{path} is no Serve YAML file with an application and its deployments") from None
    default = args.get("default_model", DEFAULT_MODEL_NAME)
    name = model or default
    if name not in models:
        raise InvalidValue(f"{path} has no model {name!r}; it has {', '.join(models)}")
    deployment = "Generator" if name == default else f"Generator-{name}"
    autoscaling = deployments.get(deployment, {}).get("autoscaling_config")
    if autoscaling is None:
        raise InvalidValue(
            f"{path} has no autoscaling_config for the deployment {deployment}",
            hint="Leave --config out and give --min-replicas, --max-replicas and the rest.",
        )
    said = autoscaling | (autoscaling.get("policy") or {}).get("policy_kwargs", {})
    said["look_ahead_s"] = args.get("look_ahead_s", Settings.model_fields["look_ahead_s"].default)
    try:
        chosen = ModelSettings.model_validate(models[name] or {})
    except ValidationError as error:
        [first, *_] = error.errors()
        raise InvalidValue(f"{path}: models.{name}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if chosen.gpu_price_per_hour is not None:
        said["price_per_hour"] = chosen.gpu_price_per_hour
    known = {field.name for field in fields(ClusterSettings)}
    return name, chosen, {setting: value for setting, value in said.items() if setting in known}
