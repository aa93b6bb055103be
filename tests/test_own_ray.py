"""A Ray of our own in a process that had one before, or had imported Ray: Python users have both."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
if sys.argv[1] == "imported before":
    import ray
from nemo_ray import session
for _ in range(2):
    environment = session.Environment()
    session.start_local(1, environment)
    import ray
    print(ray.get(ray.remote(lambda: "an answer").remote()))
    session.shutdown()
    environment.restore()
"""


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", ["by us", "imported before"])
def test_it_starts_twice(case: str, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.stdout.split("\n")[:2] == ["an answer", "an answer"], done.stderr
    assert (tmp_path / ".ray" / "auth_token").exists() == (case == "imported before")
