"""Every cluster that our files make asks for a token: who has none runs nothing on it.

tests/cluster has the rules of each kind of file. Here none is forgotten, whatever kind it is.
"""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[2]
_STARTS = re.compile(r"ray start|kind: Ray(Cluster|Job)")
_TOKEN = re.compile(r"RAY_AUTH_MODE=token|authOptions:\s*\n\s*mode: token")


def files() -> list[Path]:
    """Those that start a Ray, of all kinds."""
    everything = [path for path in (ROOT / "cluster").rglob("*") if path.is_file()]
    return sorted(path for path in everything if _STARTS.search(path.read_text(encoding="utf-8")))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "cluster"))


def without_comments(path: Path) -> str:
    """What is obeyed, not what is said."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#") or path.suffix == ".md")


def test_these_start_clusters() -> None:
    found = {name(path) for path in files()}
    known = {"aws-h100.yaml", "azure-h100.yaml", "gcp-h100.yaml", "slurm/nemo_ray.sbatch"}
    assert found >= known | {"kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "on-premises/cluster.yaml"}


@pytest.mark.parametrize("path", files(), ids=name)
def test_a_cluster_asks_for_a_token(path: Path) -> None:
    text = without_comments(path)
    assert _TOKEN.search(text) and not re.search(r"AUTH_MODE[=:]\s*[\"']?disabled|mode: disabled", text)


@pytest.mark.parametrize("path", files(), ids=name)
def test_no_token_is_written_down(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b[0-9a-f]{40,}\b|\bhf_[A-Za-z0-9]{8,}|\bAKIA[0-9A-Z]{12,}", text)


@pytest.mark.parametrize("path", files(), ids=name)
def test_the_dashboard_is_on_the_heads_loopback(path: Path) -> None:
    """KubeRay sets the address itself, and a service of type ClusterIP keeps it inside."""
    text = without_comments(path)
    heads = re.findall(r"(?:ray start|node \S+) --head(?:[^\n]|\n\s+--)*", text)
    assert heads or "kind: Ray" in text
    assert all("--dashboard-host=127.0.0.1" in head for head in heads)
    assert "0.0.0.0" not in text and not re.search(r"serviceType: (LoadBalancer|NodePort)", text)
