"""The manifests of configs/deploy/kubernetes, rendered by kustomize and validated offline.

Kubernetes' own kinds: kubernetes-validate, which ships the API server's schemas. Other kinds (custom resources) have no
package of schemas: crd_schemas.yaml holds what we use of each, written after its reference and closed, so that a
misspelt field fails here and not silently in a cluster, where the API server prunes it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "configs" / "deploy" / "kubernetes"
OVERLAYS = ("single", "replicas-8", "replicas-64", "canary")
TOOLS = ROOT / ".venv-tools" / "bin"
VERSIONS = ("1.32", "1.37")  # the oldest and the newest Kubernetes that the manifests are written for

Manifest = dict[str, Any]


def render(overlay: str) -> list[Manifest]:
    """What `kubectl apply -k` would send, without warnings."""
    kubectl = shutil.which("kubectl")
    assert kubectl is not None, "kubectl is not installed. scripts/test --all says where it comes from."
    command = [kubectl, "kustomize", str(KUBERNETES / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and not done.stderr, (
        f"{done.stderr}\nThis needs kustomize 5: kubectl >= 1.27 (Debian 13's kubernetes-client, or pkgs.k8s.io)."
    )
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def of_kind(manifests: Iterable[Manifest], kind: str) -> list[Manifest]:
    """Those of a kind, in order."""
    return [one for one in manifests if one["kind"] == kind]


def named(manifests: Iterable[Manifest], kind: str, name: str) -> Manifest:
    """The one with that name."""
    (found,) = (one for one in of_kind(manifests, kind) if one["metadata"]["name"] == name)
    return found


def custom_schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """(apiVersion, kind) -> closed JSON schema of the spec."""
    documents = yaml.safe_load((Path(__file__).parent / "crd_schemas.yaml").read_text())
    return {(one["apiVersion"], one["kind"]): _closed(one["spec"]) for one in documents}


def validate(manifests: list[Manifest], folder: Path) -> None:
    """Raises AssertionError or jsonschema's error with the place."""
    schemas = custom_schemas()
    core = [one for one in manifests if (one["apiVersion"], one["kind"]) not in schemas]
    for one in manifests:
        if (one["apiVersion"], one["kind"]) in schemas:
            assert set(one) == {"apiVersion", "kind", "metadata", "spec"}, one["metadata"]["name"]
            jsonschema.Draft202012Validator(schemas[one["apiVersion"], one["kind"]]).validate(one["spec"])
    program = TOOLS / "kubernetes-validate"
    assert program.exists(), "kubernetes-validate is not set up. Run scripts/_tools, or scripts/test --all."
    file = folder / "core.yaml"
    file.write_text(yaml.safe_dump_all(core))
    for version in VERSIONS:
        command = [str(program), "--strict", "-k", version, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"Kubernetes {version}: {done.stdout}{done.stderr}"


def pod_specs(manifests: Iterable[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(name of the Deployment, its pod's spec)."""
    for one in of_kind(manifests, "Deployment"):
        yield one["metadata"]["name"], one["spec"]["template"]["spec"]


def _closed(schema: Any) -> Any:
    """The schema with no further properties in any object that lists its own."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if "properties" in closed and "type" in closed:
        closed.setdefault("additionalProperties", False)
    return closed
