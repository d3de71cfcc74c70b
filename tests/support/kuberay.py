"""The part of KubeRay's ray.io/v1 (and of Kubernetes') API that deploy/ uses: names, types and values as its CRDs have them.

A field that is not here is refused: look it up in the CRD, then add it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


class Strict(BaseModel):
    """No unknown fields, and no conversions: YAML's 2 is no "2" to the Kubernetes API."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Port(Strict):
    containerPort: int = Field(ge=1, le=65535)
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,15}$")]


class Variable(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$")]
    value: str


class VolumeMount(Strict):
    name: Name
    mountPath: str


class Container(Strict):
    name: Name
    image: str
    env: list[Variable] = []
    ports: list[Port] = []
    resources: Resources
    volumeMounts: list[VolumeMount] = []


class Claim(Strict):
    claimName: Name


class EmptyDir(Strict):
    medium: Literal["", "Memory"]
    sizeLimit: Quantity


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class SecurityContext(Strict):
    runAsNonRoot: bool
    runAsUser: int
    fsGroup: int


class PodSpec(Strict):
    securityContext: SecurityContext
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume] = []


class PodTemplate(Strict):
    spec: PodSpec


class Pod(Strict):
    """A pod of a group, and how Ray is started in it."""

    rayStartParams: dict[str, str]
    template: PodTemplate

    @property
    def container(self) -> Container:
        """Ray's: the first one."""
        return self.template.spec.containers[0]

    def volume_at(self, path: str) -> Volume:
        """What Ray's container finds at that path."""
        (mount,) = [mount for mount in self.container.volumeMounts if mount.mountPath == path]
        (volume,) = [volume for volume in self.template.spec.volumes if volume.name == mount.name]
        return volume


class HeadGroupSpec(Strict):
    rayStartParams: dict[str, str] = {}
    template: PodTemplate
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None

    @property
    def pod(self) -> Pod:
        """Its pod."""
        return Pod(rayStartParams=self.rayStartParams, template=self.template)


class WorkerGroupSpec(Strict):
    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)
    rayStartParams: dict[str, str] = {}
    template: PodTemplate

    @property
    def pod(self) -> Pod:
        """Each of its pods."""
        return Pod(rayStartParams=self.rayStartParams, template=self.template)


class AuthOptions(Strict):
    """Since KubeRay 1.5.1."""

    mode: Literal["disabled", "token"]


class RayClusterSpec(Strict):
    rayVersion: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$")]
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool = False
    headGroupSpec: HeadGroupSpec
    workerGroupSpecs: list[WorkerGroupSpec]


class RayJobSpec(Strict):
    entrypoint: str
    runtimeEnvYAML: str = ""
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"] = "K8sJobMode"
    backoffLimit: int = Field(default=0, ge=0)
    activeDeadlineSeconds: int | None = Field(default=None, gt=0)
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int = Field(default=0, ge=0)
    rayClusterSpec: RayClusterSpec


class ClaimSpec(Strict):
    accessModes: list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]]
    storageClassName: str
    resources: dict[Literal["requests"], dict[Literal["storage"], Quantity]]


class PersistentVolumeClaim(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class KubernetesManifest(Strict):
    """A RayCluster or a RayJob."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster", "RayJob"]
    metadata: Metadata
    spec: RayClusterSpec | RayJobSpec

    @property
    def cluster(self) -> RayClusterSpec:
        """Of either."""
        return self.spec.rayClusterSpec if isinstance(self.spec, RayJobSpec) else self.spec


def check_manifest(item: dict[str, Any]) -> None:
    """Raise ValueError where the API would refuse the document, or ignore a part of it."""
    if item.get("apiVersion") == "v1":
        PersistentVolumeClaim.model_validate(item)
        return
    manifest = KubernetesManifest.model_validate(item)
    if (manifest.kind == "RayJob") != isinstance(manifest.spec, RayJobSpec):
        raise ValueError(f"a {manifest.kind} has the spec of another kind")
    for group in manifest.cluster.workerGroupSpecs:
        if not group.minReplicas <= group.replicas <= group.maxReplicas:
            raise ValueError(f"{group.groupName}: replicas must lie between minReplicas and maxReplicas, got {group.replicas}")
    for pod in (manifest.cluster.headGroupSpec.pod, *(group.pod for group in manifest.cluster.workerGroupSpecs)):
        volumes = {volume.name for volume in pod.template.spec.volumes}
        missing = {mount.name for mount in pod.container.volumeMounts} - volumes
        if missing:
            raise ValueError(f"{pod.container.name} mounts volumes that are not there: {missing}")


def quantity(text: str) -> float:
    """Bytes (or units) of a Kubernetes quantity."""
    number = text.rstrip("".join(UNITS))
    return float(number) * UNITS[text.removeprefix(number)]
