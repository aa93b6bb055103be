"""The Grafana dashboard asks for metrics that the code exports, for all of them, and for nothing else."""

import json
import re
from pathlib import Path

from nemo_ray.train.ray_metrics import TAG, names

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "nemo_ray.json"
_METRIC = re.compile(r"\bray_\w+")


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_every_metric_is_shown_and_none_is_misspelt() -> None:
    shown = {name for text in expressions() for name in _METRIC.findall(text)}
    assert shown == set(names())


def test_every_panel_is_of_the_chosen_runs() -> None:
    found = json.loads(DASHBOARD.read_text())
    assert all(f'{{{TAG}=~"$run"}}' in text for text in expressions())
    variables = {variable["name"]: variable for variable in found["templating"]["list"]}
    assert variables["run"]["definition"] == f"label_values({names()[0]}, {TAG})"
    sources = [target["datasource"]["uid"] for panel in found["panels"] for target in panel["targets"]]
    assert set(sources) == {"${datasource}"} and variables["datasource"]["query"] == "prometheus"


def test_panels_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for place in (panel["gridPos"] for panel in panels):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
