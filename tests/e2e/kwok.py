"""What KWOK does in the place of kubelets: nodes and pods come up at once, pods that are deleted end before they go."""

from collections.abc import Sequence

from standin.cluster import Object


def _stage(name: str, kind: str, expressions: Sequence[tuple[str, str, list[str]]], following: Object) -> Object:
    chosen = [
        {"key": key, "operator": operator} | ({"values": values} if values else {})
        for key, operator, values in expressions
    ]
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": name},
        "spec": {
            "resourceRef": {"apiGroup": "v1", "kind": kind},
            "selector": {"matchExpressions": chosen},
            "next": following,
        },
    }


_NODE_UP = """
{{ $now := Now }}
conditions:
{{ range NodeConditions }}
- type: {{ .type | Quote }}
  status: {{ .status | Quote }}
  reason: {{ .reason | Quote }}
  message: {{ .message | Quote }}
  lastHeartbeatTime: {{ $now | Quote }}
  lastTransitionTime: {{ $now | Quote }}
{{ end }}
addresses:
- type: InternalIP
  address: {{ NodeIP | Quote }}
nodeInfo:
  architecture: {{ index .metadata.labels "kubernetes.io/arch" | Quote }}
  operatingSystem: linux
  kubeletVersion: {{ printf "kwok-%s" Version | Quote }}
  kubeProxyVersion: ""
  containerRuntimeVersion: ""
  kernelVersion: ""
  osImage: ""
  machineID: ""
  systemUUID: ""
  bootID: ""
phase: Running
"""

_POD_UP = """
{{ $now := Now }}
conditions:
{{ range (list "Initialized" "ContainersReady" "Ready") }}
- type: {{ . | Quote }}
  status: "True"
  lastTransitionTime: {{ $now | Quote }}
{{ end }}
{{ range .spec.readinessGates }}
- type: {{ .conditionType | Quote }}
  status: "True"
  lastTransitionTime: {{ $now | Quote }}
{{ end }}
initContainerStatuses:
{{ range .spec.initContainers }}
- name: {{ .name | Quote }}
  image: {{ .image | Quote }}
  imageID: ""
  ready: true
  restartCount: 0
  {{ if eq (or .restartPolicy "") "Always" }}
  started: true
  state: {running: {startedAt: {{ $now | Quote }}}}
  {{ else }}
  started: false
  state: {terminated: {exitCode: 0, reason: Completed, startedAt: {{ $now | Quote }}, finishedAt: {{ $now | Quote }}}}
  {{ end }}
{{ end }}
containerStatuses:
{{ range .spec.containers }}
- name: {{ .name | Quote }}
  image: {{ .image | Quote }}
  imageID: ""
  ready: true
  started: true
  restartCount: 0
  state: {running: {startedAt: {{ $now | Quote }}}}
{{ end }}
hostIP: {{ NodeIPWith .spec.nodeName | Quote }}
{{ $meta := .metadata }}
podIP: {{ PodIPWith .spec.nodeName (or .spec.hostNetwork false) $meta.uid $meta.name $meta.namespace | Quote }}
phase: Running
startTime: {{ $now | Quote }}
"""

# A kubelet gives a pod that it ends a final phase before the object goes: the Job controller counts by it.
_POD_DOWN = """
{{ $now := Now }}
containerStatuses:
{{ range .spec.containers }}
- name: {{ .name | Quote }}
  image: {{ .image | Quote }}
  imageID: ""
  ready: false
  started: false
  restartCount: 0
  state: {terminated: {exitCode: 143, reason: Error, startedAt: {{ $now | Quote }}, finishedAt: {{ $now | Quote }}}}
{{ end }}
phase: Failed
"""

_DELETED = ".metadata.deletionTimestamp"
_PHASE = ".status.phase"
_READY = '.status.conditions.[] | select( .type == "Ready" ) | .status'

# What KWOK does in the place of kubelets. Jobs' pods run until `finish_pod` ends them.
STAGES = (
    _stage("node-up", "Node", [(_READY, "NotIn", ["True"])], {"statusTemplate": _NODE_UP}),
    _stage(
        "pod-up",
        "Pod",
        [(_DELETED, "DoesNotExist", []), (".status.podIP", "DoesNotExist", [])],
        {"statusTemplate": _POD_UP},
    ),
    _stage(
        "pod-down",
        "Pod",
        [(_DELETED, "Exists", []), (_PHASE, "NotIn", ["Succeeded", "Failed"])],
        {"statusTemplate": _POD_DOWN},
    ),
    _stage("pod-gone", "Pod", [(_DELETED, "Exists", []), (_PHASE, "In", ["Succeeded", "Failed"])], {"delete": True}),
)
