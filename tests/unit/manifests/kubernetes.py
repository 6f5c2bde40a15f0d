"""Kubernetes' own schemas, with every key that they do not know refused (the package kubernetes-validate carries them)."""

import functools
from typing import Any

import jsonschema_rs
from kubernetes_validate.utils import schema_contents

VERSIONS = ("1.31", "1.37")
"""The oldest Kubernetes that docs/deploy.md asks for, and the newest whose schemas the package carries."""


class Refused(ValueError):
    """An object that the API server would refuse, or of which it would drop a part. Says where and why."""


@functools.cache
def _definitions(version: str) -> dict[str, Any]:
    return schema_contents(f"kubernetes-json-schema/v{version}.0-local-strict/_definitions.json", version)


@functools.cache
def _validator(version: str, name: str) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(_definitions(version) | {"$ref": f"#/$defs/{name}"})


@functools.cache
def _name_of(version: str, api_version: str, kind: str) -> str:
    group, _, api = api_version.rpartition("/")
    wanted = {"group": group, "kind": kind, "version": api}
    for name, definition in _definitions(version)["$defs"].items():
        if wanted in definition.get("x-kubernetes-group-version-kind", ()):
            return name
    raise Refused(f"Kubernetes {version} knows no {api_version} {kind}")


def check(thing: dict[str, Any], name: str | None = None) -> None:
    """Raise `Refused` where a core object does not fit its schema, or has a key that is not in it, in one of `VERSIONS`.

    `name` is that of a definition (`io.k8s.api.core.v1.PodTemplateSpec`) for a thing that is no object by itself.
    """
    for version in VERSIONS:
        validator = _validator(version, name or _name_of(version, thing["apiVersion"], thing["kind"]))
        for error in validator.iter_errors(thing):
            raise Refused(f"{'.'.join(str(step) for step in error.instance_path)}: {error.message}")


def pod_template(template: dict[str, Any]) -> dict[str, Any]:
    """A pod template inside a custom resource, once it is checked."""
    check(template, "io.k8s.api.core.v1.PodTemplateSpec")
    return template
