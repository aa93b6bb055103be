"""The report of a sweep: what its charts, its table and its configuration say, from the sweep's directory."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nemo_ray.pages import MOST_POINTS, thin
from nemo_ray.tune import figures
from nemo_ray.tune.figures import Trial, importance
from nemo_ray.tune.report import write_report
from nemo_ray.tune.sweep_dir import Change, Population, SweepDir, TrialEnd
from nemo_ray.tune.trial import Evaluation

POINTS = [
    {"lora_r": 8, "learning_rate": 1e-4, "lora_target_modules": ["q_proj"]},
    {"lora_r": 8, "learning_rate": 1e-2, "lora_target_modules": ["q_proj", "v_proj"]},
    {"lora_r": 16, "learning_rate": 1e-3, "lora_target_modules": ["q_proj"]},
    {"lora_r": 16, "learning_rate": 1e-1, "lora_target_modules": ["q_proj"]},
    {"lora_r": 32, "learning_rate": 1e-1, "lora_target_modules": ["q_proj"]},
]
CURVES = [[4.0, 3.9], [3.8, 3.0], [3.9], [math.inf], []]
REASON = "died of </script><b>hunger"
ENDS = [
    TrialEnd(0, "finished", 2, 3.9, 20),
    TrialEnd(1, "finished", 2, 3.0, 20),
    TrialEnd(2, "stopped", 1, 3.9, 10, "3.8 was wanted to go on", 0),
    TrialEnd(3, "failed", 1, math.inf, 10, REASON),
]


def write_sweep(path: Path, ended: bool = True, begun: int = 4, **more: Any) -> SweepDir:
    """A sweep of five, the last of which has not begun. `more`: facts."""
    folder = SweepDir(path)
    facts = {"tune": {"metric": "eval_loss", "mode": "min"}, "trials": POINTS, "elapsed_s": 75.0}
    facts["config"] = {"base_model": "a<b", "lora_r": 4, "deepspeed": None}
    for number, curve in enumerate(CURVES[:begun]):
        run = folder.trial(number)
        run.path.mkdir(parents=True)
        run.write_run({})
        for index, value in enumerate(curve):
            run.append_metrics({"step": 10 * index + 5, "loss": value + 0.5})
            run.append_metrics({"step": 10 * (index + 1), "eval_loss": value})
        run.flush_metrics()
        if ended:
            folder.write_end(ENDS[number])
    facts |= more
    folder.write(facts | ({"outcome": "finished", "best": 1} if ended else {}))
    write_report(folder)
    return folder


def charts(page: str) -> list[list[dict[str, Any]]]:
    """The traces of each chart."""
    found = []
    for place in re.finditer(r'Plotly\.newPlot\(\s*"[^"]+",\s*(?=\[)', page):
        traces, _ = json.JSONDecoder().raw_decode(page, place.end())
        found.append(traces)
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_sweep(tmp_path_factory.mktemp("report") / "sweep").report_file.read_text(encoding="utf-8")


def test_every_trials_curves_are_drawn_and_the_best_stands_out(page: str) -> None:
    curves, training, *_ = charts(page)
    assert [trace["name"] for trace in curves] == ["trial 0", "trial 1, best", "trial 2", "trial 3"]
    assert [trace["y"] for trace in curves[:3]] == CURVES[:3] and curves[1]["x"] == [10, 20]
    assert curves[1]["line"]["width"] > curves[0]["line"]["width"]
    assert training[1]["y"] == [4.3, 3.5] and training[1]["x"] == [5, 15]


def test_the_metric_stands_over_the_learning_rate_by_rank(page: str) -> None:
    eight, sixteen, best = charts(page)[2]
    assert (eight["name"], eight["x"], eight["y"]) == ("lora_r=8", [1e-4, 1e-2], [3.9, 3.0])
    assert (sixteen["name"], sixteen["x"], sixteen["marker"]["symbol"]) == ("lora_r=16", [1e-3], ["x"])
    assert (best["x"], best["y"]) == ([1e-2], [3.0])


def test_a_line_through_all_parameters_is_a_trial(page: str) -> None:
    lines = charts(page)[3]
    assert len(lines) == 3, "no line of a trial whose figure is infinite"
    names = ["lora_r", "learning_rate", "lora_target_modules", "eval_loss"]
    assert all(line["x"] == names for line in lines)
    assert np.allclose([line["y"][1] for line in lines], [0, 1, 0.5]), "a learning rate by its logarithm"


def test_the_table_says_how_each_ended_and_text_stays_text(page: str) -> None:
    rows = re.findall(r"<tr><th scope=\"row\">(\d+)</th>(.*?)</tr>", page)
    assert [number for number, _ in rows] == ["0", "1", "2", "3"]
    assert "finished, best" in rows[1][1] and "3.0000" in rows[1][1]
    assert "3.8 was wanted to go on" in rows[2][1]
    assert "died of &lt;/script&gt;&lt;b&gt;hunger" in rows[3][1] and REASON not in page


def test_the_configuration_of_the_best_can_be_copied(page: str) -> None:
    (text,) = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert yaml.safe_load(text.replace("&lt;", "<")) == {"base_model": "a<b", **POINTS[1]}


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    head = page[: page.index("<script>")]
    assert (
        "Content-Security-Policy" in head
        and "default-src 'none'" in head
        and 'http-equiv="refresh' not in head
    )
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", page)


def test_it_is_drawn_while_trials_run_and_before_any_has_begun(tmp_path: Path) -> None:
    page = write_sweep(tmp_path / "running", ended=False, begun=1).report_file.read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' in page and charts(page)[0][0]["y"] == CURVES[0] and "<pre>" not in page
    page = write_sweep(tmp_path / "new", ended=False, begun=0).report_file.read_text(encoding="utf-8")
    assert "0 of 5" in page and not charts(page)


def trial(number: int, values: list[float], **point: Any) -> Trial:
    evaluations = [Evaluation(index + 1, index, value) for index, value in enumerate(values)]
    return Trial(number, point, "finished", evaluations, (), values[-1])


def test_importance_compares_where_all_trials_got_to() -> None:
    """The second evaluation would say the opposite; only one trial has none of it."""
    rates, ranks = [1, 2, 3, 4], ["a", "b", "a", "b"]
    firsts = [1.0, 2.0, 3.0, 4.0]
    trials = [
        trial(n, [first] + ([9.0 - n] if n else []), rate=rate, kind=kind, same=1)
        for n, (first, rate, kind) in enumerate(zip(firsts, rates, ranks, strict=True))
    ]
    at, count, shares = importance(trials)
    assert (at, count, list(shares)) == (1, 4, ["rate", "kind"])
    assert shares["rate"] == pytest.approx(1) and shares["kind"] == pytest.approx(0.2)
    assert importance(trials[:2])[2] == {}


def test_ranks_of_equal_values_are_shared_and_constant_ones_explain_nothing() -> None:
    assert figures._ranks([5.0, 1.0, 5.0]).tolist() == [1.5, 0, 1.5]
    assert importance([trial(n, [2.0], rate=n) for n in range(4)])[2] == {"rate": 0.0}


def test_a_long_line_is_thinned_and_keeps_its_end() -> None:
    points = [(step, float(step)) for step in range(1000)]
    thinned = thin(points)
    assert len(thinned) <= MOST_POINTS and thinned[-1] == points[-1] and thinned == sorted(thinned)
    assert thin(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_gpu_hours_and_costs_are_shown_where_there_are_such(tmp_path: Path, page: str) -> None:
    assert "GPU hours" not in page and '<th scope="col">cost' not in page
    facts = {"trial_seconds": [3600.0, 7200.0, 0.0, 0.0, 0.0], "trial_gpus": [0.5] * 5}
    hours = write_sweep(tmp_path / "hours", **facts).report_file.read_text()
    assert "<dt>GPU hours</dt><dd>1.50<small>0.5 a trial" in hours and "cost</th>" not in hours
    tune = {"metric": "eval_loss", "mode": "min", "price_per_gpu_hour": 3.0}
    costs = write_sweep(tmp_path / "costs", **facts, tune=tune).report_file.read_text()
    assert "at 3 each: 4.50 in all" in costs
    (row,) = re.findall(r"<tr>(?:(?!</tr>).)*finished, best.*?</tr>", costs)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells[-5:-2] == ["120.0", "1.00", "3.00"]


def test_a_trial_that_waits_for_the_others_does_not_run(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", ended=False)
    assert "<dt>Running</dt><dd>4" in folder.report_file.read_text()
    folder.trial(1).update_run({"outcome": "stopped"})
    write_report(folder)
    page = folder.report_file.read_text()
    assert "<dt>Running</dt><dd>3" in page and "<td>waiting</td>" in page


def test_who_went_on_from_whom_is_told(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep")
    assert "Generations" not in folder.report_file.read_text()
    folder.write_population(Population(1, (Change(1, 10, 1, 0, {**POINTS[1], "learning_rate": 0.037}),)))
    write_report(folder)
    page = folder.report_file.read_text(encoding="utf-8")
    generations = page[page.index("Generations") :]
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", generations[generations.index("<tbody") :])
    assert cells[:5] == ["10", "1", "0", "8", "0.037"]
    trials = page[page.index("A click on a column") : page.index("Generations")]
    assert "0.037" in trials and "0.037" in page[page.index("Configuration of trial 1") :]
