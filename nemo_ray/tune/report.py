"""report.html of a sweep: charts, a table, the best trial's configuration. One file, which loads nothing.

Written from the sweep's directory alone, again and again while the sweep runs.
"""

from collections.abc import Sequence
from typing import Any

import yaml

from nemo_ray.config.translate import show
from nemo_ray.data.charts import number, section, soft, table, text
from nemo_ray.pages import Tile, chart, page
from nemo_ray.storage import publish_bytes
from nemo_ray.train.progress import duration
from nemo_ray.tune import figures
from nemo_ray.tune.budget import Spent
from nemo_ray.tune.course import best_of
from nemo_ray.tune.figures import Trial
from nemo_ray.tune.shards import Shard
from nemo_ray.tune.sweep_dir import Change, SweepDir, TrialEnd
from nemo_ray.tune.trial import Teller


def write_report(folder: SweepDir) -> None:
    """Write report.html of the sweep in `folder`, running or ended, in place of an earlier one.

    Raises: OSError where it cannot be written.
    """
    publish_bytes(folder.report_file, page_of(folder).encode())
    folder.keep(folder.report_file)


def page_of(folder: SweepDir) -> str:
    """The page of the sweep in `folder`, from its files."""
    facts = folder.read()
    facts["trials"] = folder.points(facts["trials"])
    ends = {n: end for n in range(len(facts["trials"])) if (end := folder.read_end(n)) is not None}
    trials, changes = _trials(folder, facts, ends), folder.read_population().changes
    return report_page(folder.name, facts, trials, ends, changes)


def _trials(folder: SweepDir, facts: dict[str, Any], ends: dict[int, TrialEnd]) -> list[Trial]:
    found = []
    for index, point in enumerate(facts["trials"]):
        run, end = folder.trial(index), ends.get(index)
        if point is None or (end is None and not run.holds_run()):
            continue
        evaluations = Teller(run, facts["tune"]["metric"]).new()
        if end is not None and end.evaluation:
            evaluations = evaluations[: end.evaluation]  # what came after does not count
        last = evaluations[-1].value if evaluations else None
        losses = [(row["step"], row["loss"]) for row in run.read_metrics() if row.get("loss") is not None]
        waits = run.read_run().get("outcome") == "stopped"  # of a population, for the others
        state = end.status if end else "stopped" if "outcome" in facts else "waiting" if waits else "running"
        found.append(Trial(index, point, state, evaluations, losses, end.value if end else last))
    return found


def report_page(
    title: str,
    facts: dict[str, Any],
    trials: list[Trial],
    ends: dict[int, TrialEnd],
    changes: Sequence[Change],
) -> str:
    """The page's HTML. Args: `facts`: sweep.json, with the values that trials have now; `trials`: those that
    have begun; `changes`: of a population."""
    section_keys, running = facts["tune"], "outcome" not in facts
    metric, best = section_keys["metric"], best_of(ends.values(), section_keys["mode"])
    body = []
    for name, words, figure in (
        (metric, "At each evaluation.", figures.curves(trials, best, metric)),
        ("Training loss", "", figures.training(trials, best)),
        (
            "Where the best is",
            "Circles trained to their end, crosses did not.",
            figures.landscape(trials, best, metric),
        ),
        ("All parameters", "A line is a trial.", figures.parallel(trials, metric)),
    ):
        if figure is not None and figure.data:
            body.append(section(name, soft(words), chart(figure)))
    body += [_importance(trials), _table(trials, ends, best, metric, Spent.of(facts))]
    if changes:
        body.append(_changes(changes))
    if best is not None:
        body.append(_configuration(facts, best))
    tiles = _tiles(facts, trials, ends, best)
    return page(f"Sweep {title}", tiles, body, running=running)


def _tiles(
    facts: dict[str, Any], trials: list[Trial], ends: dict[int, TrialEnd], best: int | None
) -> list[Tile]:
    states = [end.status for end in ends.values()]
    num_trials = len(Shard.of(facts).numbers(len(facts["trials"])))
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    tiles = [
        ("Trials", f"{len(ends)} of {num_trials}", counts or "none has ended"),
        ("Running", number(sum(trial.state == "running" for trial in trials)), "at the moment"),
        ("Time", duration(facts.get("elapsed_s", 0.0)), "of the whole sweep"),
    ]
    spent = Spent.of(facts)
    if spent.most_gpus:
        cost = spent.cost()
        words = (
            f"{spent.most_gpus:g} a trial" if cost is None else f"at {spent.price:g} each: {cost:,.2f} in all"
        )
        tiles.append(("GPU hours", f"{spent.gpu_hours():,.2f}", words))
    if best is not None:
        tiles.insert(0, ("Best", f"{ends[best].value:.4f}", f"trial {best}, {facts['tune']['metric']}"))
    return tiles


def _importance(trials: list[Trial]) -> str:
    at, count, shares = figures.importance(trials)
    if not shares:
        return ""
    words = (
        f"How much of the order of {count} trials each parameter explains alone, at evaluation {at}, which "
    )
    words += "all of them reached. With few trials a large share can be chance."
    return section("Importance", soft(words), chart(figures.importance_bars(shares)))


def _table(
    trials: list[Trial], ends: dict[int, TrialEnd], best: int | None, metric: str, spent: Spent
) -> str:
    names = list(trials[0].point) if trials else []
    rows = []
    took = [
        "minutes",
        *(["GPU hours"] if spent.most_gpus else []),
        *(["cost"] if spent.cost() is not None else []),
    ]
    for trial in trials:
        end = ends.get(trial.number)
        step = end.step if end else trial.evaluations[-1].step if trial.evaluations else None
        rows.append(
            [
                trial.number,
                f"{trial.state}{', best' if trial.number == best else ''}",
                "" if trial.value is None else f"{trial.value:.4f}",
                "" if step is None else step,
                *(show(trial.point[name]) for name in names),
                *_took(trial.number, spent),
                "" if end is None or end.rung is None else end.rung,
                end.reason if end else "",
            ]
        )
    heads = ["trial", "state", metric, "step", *names, *took, "rung", "reason"]
    return section(
        "Trials", soft("A click on a column sorts by it."), table(heads, rows, kind="words sorted")
    )


def _changes(changes: Sequence[Change]) -> str:
    names = list(changes[0].point)
    rows = [[one.step, one.number, one.source, *(show(one.point[name]) for name in names)] for one in changes]
    words = "Which trial went on from the weights of which, and with what values. Above are those of its end."
    heads = ["step", "trial", "from", *names]
    return section("Generations", soft(words), table(heads, rows, kind="words sorted"))


def _took(number: int, spent: Spent) -> list[str]:
    """Minutes, and GPU hours and cost where there are such."""
    hours, cost = spent.gpu_hours(number), spent.cost(number)
    found = [f"{spent.seconds.get(number, 0.0) / 60:.1f}"]
    found += [f"{hours:.2f}"] if spent.most_gpus else []
    return found + ([f"{cost:.2f}"] if cost is not None else [])


def _configuration(facts: dict[str, Any], best: int) -> str:
    own = {**facts["config"], **facts["trials"][best]}
    found = yaml.safe_dump({k: v for k, v in own.items() if v is not None}, sort_keys=False)
    lines = "\n".join(map(text, found.splitlines()))
    words = "A click selects all of it. best/config.yaml is the same, with a folder of its own to write to."
    return section(f"Configuration of trial {best}", soft(words), f"<pre>{lines}</pre>")
