"""Pods in YAML: what is understood, and what is refused with its path."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata_lab.shim.manifest import ManifestError, Volume, VolumeMount, parse_manifest

FULL = """
apiVersion: v1
kind: Pod
metadata: {name: shop, labels: {app: shop}}
spec:
  restartPolicy: OnFailure
  hostname: till
  volumes:
    - {name: shared, emptyDir: {}}
    - {name: etc, hostPath: {path: /etc, type: Directory}}
  containers:
    - name: web
      image: busybox
      command: [httpd, -f]
      args: [-p, "8080"]
      env: [{name: GREETING, value: hello}, {name: EMPTY}]
      workingDir: /srv
      stdin: true
      volumeMounts: [{name: shared, mountPath: /srv}, {name: etc, mountPath: /host, readOnly: true}]
      resources: {limits: {cpu: 500m, memory: 64Mi}, requests: {cpu: 0.1}}
      securityContext: {runAsUser: 1000, runAsGroup: 100, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
    - {name: side, image: "busybox:latest"}
"""


def test_everything_that_is_understood_is_carried_over() -> None:
    (pod,) = parse_manifest(FULL, "pod.yaml")

    web, side = pod.containers
    assert (pod.name, pod.hostname, pod.restart) == ("shop", "till", "on-failure")
    assert pod.volumes == (Volume("shared"), Volume("etc", Path("/etc"), "Directory"))
    assert (web.name, web.image, web.args, web.stdin) == ("web", "busybox", ("-p", "8080"), True)
    assert web.env == ("GREETING=hello", "EMPTY=")
    assert web.mounts == (VolumeMount("shared", "/srv"), VolumeMount("etc", "/host", True))
    assert web.wishes == {
        "entrypoint": ["httpd", "-f"],
        "cwd": "/srv",
        "cpus": 0.5,
        "memory": 64 << 20,
        "user": "1000:100",
        "read_only": True,
        "cap_drop": ["ALL"],
    }
    assert (side.image, side.wishes) == ("busybox:latest", {})


def test_pod_without_a_policy_starts_its_containers_again_always() -> None:
    text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: b, image: busybox}]}\n"

    first, second = parse_manifest(f"{text}---\n{text.replace('name: a', 'name: c')}", "pod.yaml")

    assert (first.name, first.restart, second.name) == ("a", "always", "c")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("kind: Pod", "kind: Deployment", r"\$\.kind is 'Deployment': it must be Pod"),
        ("  hostname: till", "  hostNetwork: true", r"\$\.spec\.hostNetwork is not understood"),
        ("      stdin: true", "      livenessProbe: {}", r"\$\.spec\.containers\[0\]\.livenessProbe is not understood"),
        ("emptyDir: {}", "emptyDir: {medium: Memory}", r"\$\.spec\.volumes\[0\]\.emptyDir\.medium is not understood"),
        ("emptyDir: {}", "secret: {}", r"\$\.spec\.volumes\[0\]\.secret is not understood"),
        ("name: side", "name: web", r"\$\.spec\.containers\[1\]\.name is 'web', which is there already"),
        ("{name: shared, mountPath", "{name: gone, mountPath", r"volumeMounts\[0\]\.name is 'gone': it must be a vol"),
        ("mountPath: /host", "mountPath: ../host", r"mountPath is '../host': it must be an absolute path"),
        ("memory: 64Mi", "memory: lots", r"limits\.memory is 'lots': it must be an amount of memory such as 64Mi"),
        ("cpu: 500m", "cpu: -1", r"limits\.cpu is -1: it must be a number of processors"),
        ("runAsUser: 1000", "runAsUser: root", r"securityContext\.runAsUser is 'root': it must be a whole number"),
        ("runAsUser: 1000, ", "", r"securityContext has runAsGroup alone"),
        ("value: hello", "value: 5", r"env\[0\]\.value is 5: it must be a text \(in quotes"),
        ("name: shop", "name: Shop", r"\$\.metadata\.name is 'Shop'"),
        ("      image: busybox\n", "", r"\$\.spec\.containers\[0\] has no image"),
        ("OnFailure", "Sometimes", r"\$\.spec\.restartPolicy is 'Sometimes': it must be Never or OnFailure or Always"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_path(before: str, after: str, said: str) -> None:
    assert before in FULL

    with pytest.raises(ManifestError, match=said):
        parse_manifest(FULL.replace(before, after), "pod.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no pod"),
        ("{", "is no YAML"),
        ("[]", r"\$ is \[\]: it must be an object"),
        ("!!python/object/apply:os.system [ls]", "is no YAML"),
        ("a: &x [1]\nb: *x", r"\$\.a is not understood"),
    ],
)
def test_files_without_a_pod_are_refused(text: str, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        parse_manifest(text, "pod.yaml")
