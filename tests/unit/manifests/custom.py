"""The custom resources that the manifests use, as models that refuse an unknown key, a wrong type, and what their operators refuse.

They hold the fields that the manifests use, not all there are, and were written after the operators' CRDs and validation
(KubeRay 1.7, ray-operator/controllers/ray/utils/validation.go; Prometheus operator 0.80 and later). `test_true_crds.py` holds
the manifests against the true CRDs, which no package carries, where they are at hand.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tests.unit.manifests import kubernetes


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _core(name: str) -> Any:
    def checked(value: dict[str, Any]) -> dict[str, Any]:
        kubernetes.check(value, f"io.k8s.{name}")
        return value

    return Annotated[dict[str, Any], AfterValidator(checked)]


PodTemplate = Annotated[dict[str, Any], AfterValidator(kubernetes.pod_template)]
Resources = _core("api.core.v1.ResourceRequirements")
SecurityContext = _core("api.core.v1.SecurityContext")
ValueFrom = _core("api.core.v1.EnvVarSource")
LabelSelector = _core("apimachinery.pkg.apis.meta.v1.LabelSelector")


# ---- KubeRay -----------------------------------------------------------------------------------------------------------


class Auth(Strict):
    mode: Literal["token", "disabled"] = "token"
    secretName: str | None = None


class RedisCredential(Strict):
    valueFrom: ValueFrom  # `value` would be a literal secret


class GcsFaultTolerance(Strict):
    redisAddress: str = Field(pattern=r"^rediss?://[^@/]+:\d+$")
    redisPassword: RedisCredential


class Autoscaler(Strict):
    version: Literal["v1", "v2"]
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    idleTimeoutSeconds: int = Field(ge=0)
    resources: Resources
    securityContext: SecurityContext


class Group(Strict):
    rayStartParams: dict[str, str]
    resources: dict[str, str] = {}
    labels: dict[str, str] = {}
    template: PodTemplate

    @model_validator(mode="after")
    def _as_kuberay_wants(self) -> Self:
        if self.resources and self.rayStartParams.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            raise ValueError("resources stand in `resources` and in `rayStartParams`; KubeRay takes one of them")
        if "labels" in self.rayStartParams:
            raise ValueError("labels belong to `labels`, not to `rayStartParams`")
        if self.template["spec"].get("restartPolicy", "Never") != "Never":
            raise ValueError("restartPolicy must be unset or Never with the autoscaler's version 2")
        return self


class WorkerGroup(Group):
    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)
    idleTimeoutSeconds: int = Field(ge=0)
    priority: int = 0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("replicas must lie between minReplicas and maxReplicas")
        return self


class RayCluster(Strict):
    rayVersion: str
    authOptions: Auth
    gcsFaultToleranceOptions: GcsFaultTolerance
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: Autoscaler
    headGroupSpec: Group
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)

    @model_validator(mode="after")
    def _as_kuberay_wants(self) -> Self:
        ports = {port["name"] for port in self.headGroupSpec.template["spec"]["containers"][0]["ports"]}
        if missing := {"gcs-server", "dashboard", "serve"} - ports:
            raise ValueError(
                f"the head container lacks the ports {sorted(missing)}: KubeRay makes its services from them"
            )
        return self


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "None"]


class RayServiceSpec(Strict):
    serveConfigV2: str
    rayClusterDeletionDelaySeconds: int = Field(ge=0)
    excludeHeadPodFromServeSvc: bool
    upgradeStrategy: UpgradeStrategy = UpgradeStrategy(type="NewCluster")
    rayClusterConfig: RayCluster


class Metadata(Strict):
    name: str = Field(max_length=47, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")  # KubeRay appends six characters and more
    namespace: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


# ---- the Prometheus operator -------------------------------------------------------------------------------------------


class PodMetricsEndpoint(Strict):
    port: str
    interval: str = Field(pattern=r"^\d+(ms|s|m)$")


class PodMonitorSpec(Strict):
    selector: LabelSelector
    podTargetLabels: list[str] = []
    podMetricsEndpoints: list[PodMetricsEndpoint] = Field(min_length=1)


class PodMonitor(Strict):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


class Alert(Strict):
    alert: str
    expr: str
    for_: str = Field(default="0s", alias="for", pattern=r"^\d+(s|m|h)$")
    labels: dict[str, str]
    annotations: dict[str, str]


class AlertGroup(Strict):
    name: str
    rules: list[Alert] = Field(min_length=1)


class PrometheusRuleSpec(Strict):
    groups: list[AlertGroup] = Field(min_length=1)


class PrometheusRule(Strict):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PrometheusRule"]
    metadata: Metadata
    spec: PrometheusRuleSpec


MODELS = {"RayService": RayService, "PodMonitor": PodMonitor, "PrometheusRule": PrometheusRule}


def check(thing: dict[str, Any]) -> None:
    """Raise `kubernetes.Refused` for any object, core or custom, with something in it that does not belong there."""
    if model := MODELS.get(thing["kind"]):
        try:
            model.model_validate(thing)
        except ValidationError as error:
            first = error.errors()[0]
            raise kubernetes.Refused(f"{'.'.join(str(step) for step in first['loc'])}: {first['msg']}") from None
    else:
        kubernetes.check(thing)
