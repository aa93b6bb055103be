"""A run's figures reach Prometheus: Debian's own scrapes the nodes that Ray names, and has every metric."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from nemo_ray.run_dir import RunDir
from nemo_ray.train.ray_metrics import names
from tests.e2e.command import TRAIN
from tests.e2e.compare import train_rows
from tests.e2e.nodes import nodes
from tests.e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(300)]
OFTEN = {"RAY_metrics_report_interval_ms": "500"}
# The first is known on GPUs only, and the second begins where data is waited for.
NOT_HERE = {"ray_nemo_ray_model_flops_utilization", "ray_nemo_ray_data_wait_seconds_total"}


@contextmanager
def prometheus(folder: Path, targets: Path) -> Iterator[str]:
    """Its address, for a `with` block. `targets`: the file in which Ray lists its nodes."""
    program = shutil.which("prometheus")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("prometheus is not installed: apt-get install prometheus")
        pytest.skip("prometheus is not installed")
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [str(targets)]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = f"127.0.0.1:{place.getsockname()[1]}"
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/prometheus"]
    process = subprocess.Popen(
        [program, *options, f"--web.listen-address={address}", "--log.level=error"], cwd=folder
    )
    try:
        yield address
    finally:
        process.kill()
        process.wait(20)


def ask(address: str, expression: str) -> dict[str, float]:
    """Value by run, of the last minutes: nothing while Prometheus is not up yet."""
    query = urllib.parse.urlencode({"query": f"last_over_time({expression}[5m])"})
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{query}", timeout=5) as response:
            found = json.load(response)["data"]["result"]
    except OSError:
        return {}
    return {series["metric"]["run"]: float(series["value"][1]) for series in found}


def test_every_metric_is_scraped_with_the_runs_own_values(world: World, tmp_path: Path) -> None:
    with nodes(tmp_path, 2, **OFTEN) as cluster:
        targets = Path(cluster.temp_dir) / "prom_metrics_service_discovery.json"
        with prometheus(tmp_path, targets) as address:
            config = world.write_yaml(output_dir=str(tmp_path / "watched"), max_steps=4000)
            run = world.command(
                *(*TRAIN, str(config), f"ray.address={cluster.address}", "ray.num_workers=1"),
                **cluster.environment,
            )
            wanted = set(names()) - NOT_HERE
            deadline_s = time.monotonic() + 150
            found: dict[str, dict[str, float]] = {}
            while wanted - found.keys() and time.monotonic() < deadline_s:
                assert run.process.poll() is None, run.output
                time.sleep(1)
                found |= {name: got for name in wanted - found.keys() if (got := ask(address, name))}
            assert not wanted - found.keys(), run.output[-2000:]
            assert all(set(values) == {"watched"} for values in found.values())
            loss = found["ray_nemo_ray_loss"]["watched"]
            rows = train_rows(RunDir(tmp_path / "watched"))
            assert any(abs(row["loss"] - loss) < 1e-6 * loss for row in rows)
            assert found["ray_nemo_ray_restarts"]["watched"] == 0
            assert not ask(address, "ray_nemo_ray_model_flops_utilization")
            run.kill_tree()
