"""What a sweep says at its beginning and at its end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from nemo_ray import hub
from nemo_ray.config.schema import Config
from nemo_ray.data.manifest import DataPlan
from nemo_ray.train import summary
from nemo_ray.train.progress import duration
from nemo_ray.train.resources import Demand
from nemo_ray.tune.budget import Budget
from nemo_ray.tune.course import Course
from nemo_ray.tune.load import Sweep
from nemo_ray.tune.shards import Shard
from nemo_ray.tune.space import Point
from nemo_ray.tune.sweep_dir import CONFIG_NAME, SweepDir
from nemo_ray.tune.table import describe, table


@dataclass(frozen=True)
class Told:
    """What is known when a sweep begins."""

    config: Config
    sweep: Sweep
    shard: Shard
    wanted: Demand
    at_once: int
    where: str


def print_plan(
    console: Console, told: Told, plan: DataPlan, shape: Mapping[str, Any], course: Course
) -> None:
    """The model, the data and the trials, a line each, and notices."""
    section, count = told.sweep.section, len(course.numbers)
    done = count - len(course.left())
    part = f" of {told.sweep.num_trials} (part {told.shard})" if told.shard.count > 1 else ""
    rows = [
        ("model", hub.reference(told.config)),
        ("", summary.describe_model(shape)),
        *summary.describe_data(told.config, plan, told.wanted.num_workers),
        ("prepared", plan.directory),
        ("trials", f"{count}{part}, {told.at_once} at a time{f'; {done} are done' if done else ''}"),
        (
            "judged by",
            f"{section.mode} {section.metric}, search {section.search}, scheduler {section.scheduler}",
        ),
        ("workers", f"for each trial {summary.describe_workers(told.wanted, told.config, told.where)}"),
    ]
    summary.print_rows(console, rows)
    for notice in (*told.sweep.base.notices, *plan.notices):
        console.print(Text(f"note: {notice}"), soft_wrap=True)


def print_result(
    console: Console, folder: SweepDir, course: Course, points: dict[int, Point], budget: Budget
) -> None:
    """All trials, why some did not get to their end, the best one, and what it took."""
    console.print()
    console.print(table(course, points))
    for number, end in sorted(course.ends.items()):
        if end.reason:
            console.print(Text(f"trial {number} {end.status}: {end.reason}"), soft_wrap=True)
    console.print()
    best, rows = course.best(), []
    if best is not None:
        rows = _best_rows(folder, course.metric, best, course.ends[best].value, points[best])
    if course.scheduler == "pbt":
        population = folder.read_population()
        times = summary.plural(len(population.changes), "time")
        rows.append(("generations", f"{population.generations}; {times} a trial went on from another"))
    rows += [("report", folder.shown(folder.report_file)), ("time", duration(budget.elapsed_s))]
    if hours := budget.spent.gpu_hours():
        cost = budget.spent.cost()
        rows.append(("GPU hours", f"{hours:.2f}{f', {cost:.2f} in all' if cost is not None else ''}"))
    summary.print_rows(console, rows)


def print_merged(folder: SweepDir) -> None:
    """What came of joining the parts of a sweep."""
    facts = folder.read()
    best, count = facts["best"], len(facts["trials"])
    ended = {number: end for number in range(count) if (end := folder.read_end(number)) is not None}
    parts = summary.plural(len(facts["parts"]), "part")
    rows = [("trials", f"{len(ended)} of {count} have ended, in {parts}")]
    if best is not None:
        point = folder.points(facts["trials"])[best] or {}
        rows += _best_rows(folder, facts["tune"]["metric"], best, ended[best].value, point)
    summary.print_rows(Console(highlight=False), [*rows, ("report", str(folder.report_file))])


def _best_rows(
    folder: SweepDir, metric: str, best: int, value: float | None, point: Point
) -> list[tuple[str, str]]:
    return [
        ("best", f"trial {best}: {metric} {value:.4f} with {describe(point)}"),
        ("result", folder.shown(folder.best_dir)),
        ("configuration", folder.shown(folder.best_dir / CONFIG_NAME)),
    ]
