"""transformers' own nemotron_h tests, with plain models and with patched ones: what passes goes on passing.

The released package has no model tests, so they are run from a checkout that TRANSFORMERS_CHECKOUT names (of
the installed version's tag), against the installed package. Nothing of the checkout is changed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import transformers

import nemo_ray

VARIABLE = "TRANSFORMERS_CHECKOUT"
SUITE = "tests/models/nemotron_h"
TIMEOUT_S = 140

# Tests that a patched model cannot pass, and why.
LEFT_OUT = {
    "test_can_init_all_missing_weights": "our modules take first values from load.fill, not _init_weights",
    "test_eager_matches_batched_and_grouped_inference": "it waits for a call of upstream's expert kernels",
    # torch.compile knows torch._grouped_mm in bfloat16 only, and these run in float32
    "test_generate_compil": "see above",
    "test_static_cache_no_recompile": "see above",
}

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(2 * TIMEOUT_S + 20),
    pytest.mark.skipif(
        VARIABLE not in os.environ,
        reason=f"{VARIABLE} names no checkout of transformers (its package has no model tests)",
    ),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The checkout's tests beside the installed package, where they look for src/transformers."""
    for package in ("parameterized", "httpx"):
        pytest.importorskip(package, reason=f"transformers' tests import {package}")
    checkout = Path(os.environ[VARIABLE])
    assert (checkout / SUITE).is_dir(), f"{VARIABLE}: {checkout / SUITE} does not exist"

    def other_models(folder: str, names: list[str]) -> list[str]:
        if Path(folder) != checkout / "tests" / "models":
            return []
        return [name for name in names if name not in ("nemotron_h", "__init__.py")]

    shutil.copytree(checkout / "tests", tmp_path / "tests", ignore=other_models)
    shutil.copytree(checkout / "utils", tmp_path / "utils")
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(checkout / name, tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    return tmp_path


def run(tree: Path, name: str, *options: str) -> tuple[dict[str, str], str]:
    """Results of the suite's tests by name ("passed", "skipped" or the failure's message), and the output."""
    results = tree / f"{name}.xml"
    # `tests` must be theirs: our repository's root is on the path behind the tree, which comes first with -m.
    paths = [Path(__file__).parent, Path(nemo_ray.__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path)),
    }
    command = [sys.executable, "-m", "pytest", SUITE, "-q", "-p", "no:cacheprovider", "--timeout=60"]
    command += ["-k", " and ".join(f"not {left_out}" for left_out in LEFT_OUT), f"--junitxml={results}"]
    done = subprocess.run(
        [*command, *options], cwd=tree, env=env, timeout=TIMEOUT_S, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode in (0, 1), f"pytest did not run the suite:\n{output[-3000:]}"
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = f"{child.tag}: {child.get('message')}"
            elif child.tag == "skipped" and outcome == "passed":
                outcome = "skipped"
        # A test with subtests has several entries: its first that did not pass counts.
        key = str(case.get("name"))
        if outcomes.get(key, "passed") == "passed":
            outcomes[key] = outcome
    return outcomes, output


def test_what_passes_with_plain_models_passes_with_patched_ones(tree):
    plain, _ = run(tree, "plain")
    patched, output = run(tree, "patched", "-p", "upstream_suite")
    found = re.search(r"patched (\d+) models", output)
    assert found and int(found[1]) > 50, "the plugin patched no models: the comparison says nothing"
    passed = {name for name, outcome in plain.items() if outcome == "passed"}
    assert len(passed) > 100, f"only {len(passed)} tests pass with plain models"
    broken = {name: patched.get(name, "did not run") for name in passed if patched.get(name) != "passed"}
    assert not broken
    print(f"{len(passed)} of {len(plain)} pass, plain and patched ({found[1]} models)")
