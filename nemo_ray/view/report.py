"""`nemo-ray report OUTPUT_DIR`: report.html of a run, or of a sweep: one file, which loads nothing."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml

from nemo_ray.config.command_line import CommandParser
from nemo_ray.data.charts import number, percent, section, soft, table, text
from nemo_ray.data.manifest import DataPlan
from nemo_ray.errors import ConfigError, NemoRayError, StorageError, tell
from nemo_ray.pages import Tile, chart, page, thin
from nemo_ray.storage import publish_bytes, read_json
from nemo_ray.train.summary import gib, plural
from nemo_ray.view.seen import Seen, see, see_sweep

_GIB = 2**30


def parser() -> CommandParser:
    """The command line."""
    result = CommandParser(
        prog="nemo-ray report",
        description="Write report.html of a run or a sweep into its directory: curves, speed, memory, data, "
        "events. It may be under way: call it again for a newer page.",
    )
    result.add_argument("output_dir", metavar="OUTPUT_DIR", help="its output_dir, a folder or a URL")
    result.add_argument("--output", metavar="FILE", help="where to write it instead")
    return result


def run_page(seen: Seen) -> str:
    """The page of a run."""
    title = f"Run {seen.run.place.rstrip('/').rpartition('/')[2]}"
    sections = [
        *_charts(seen),
        _profile(seen.facts.get("profile", {})),
        _data(seen),
        section("Events", table(["when", "what"], [[e.time, e.what] for e in seen.events()], kind="words")),
        _completions(seen),
        _configuration(seen.facts.get("config", {})),
    ]
    return page(title, _tiles(seen), [part for part in sections if part], running=seen.goes_on)


def _tiles(seen: Seen) -> list[Tile]:
    steps, evaluations, best = seen.steps, seen.evaluations, seen.best
    total = seen.progress.get("max_steps")
    last = steps[-1] if steps else {"step": 0, "loss": None}
    tiles = [("State", seen.state, f"step {last['step']}" + (f" of {total}" if total else ""))]
    if last["loss"] is not None:
        tiles.append(("Training loss", f"{last['loss']:.4f}", "of the last step"))
    if evaluations:
        words = f"{evaluations[0]['eval_loss']:.4f} at first"
        if best is not None:
            words += f", best {best['eval_loss']:.4f} at step {best['step']}"
        tiles.append(("Held-out loss", f"{evaluations[-1]['eval_loss']:.4f}", words))
    speed = seen.recent("tokens_per_s")
    if speed is not None:
        words = f"{seen.waiting_share:.1%} of the time without data"
        tiles.append(("Tokens/s", number(speed), words))
        most = max(row["peak_memory_bytes"] for row in steps)
        tiles.append(("Memory", gib(most), "at most, on rank 0"))
    return tiles


def _charts(seen: Seen) -> list[str]:
    steps, evaluations = seen.steps, seen.evaluations
    restarts = f"{plural(len(seen.failures), 'failure')} of workers: see the events." if seen.failures else ""
    losses = _figure(
        "loss", {"training": _points(steps, "loss"), "held-out": _points(evaluations, "eval_loss")}
    )
    names = {name for row in evaluations for name in row.get("eval_datasets", {})}
    parts = [("Loss", restarts, losses)]
    if len(names) > 1:
        lines = {name: _of_dataset(evaluations, name) for name in sorted(names)}
        parts.append(("Held-out loss by dataset", "", _figure("loss", lines)))
    norms = {"norm of the gradient": _points(steps, "grad_norm")}
    parts += [
        ("Learning rate", "", _figure("learning rate", {"learning rate": _points(steps, "lr")})),
        ("Gradient", "Before clipping.", _figure("norm", norms)),
        ("Speed", "", _figure("tokens/s", {"tokens/s": _points(steps, "tokens_per_s")})),
        ("Seconds a step", "", _figure("seconds", _seconds(steps))),
        (
            "Memory",
            "The most that rank 0 has held so far.",
            _figure("GiB", {"held": _points(steps, "peak_memory_bytes", lambda n: n / _GIB)}),
        ),
    ]
    return [section(name, soft(words), chart(figure)) for name, words, figure in parts if figure.data]


def _seconds(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    return {"in all": _points(steps, "step_s"), "waiting for data": _points(steps, "data_wait_s")}


def _points(
    rows: Sequence[Mapping[str, Any]], name: str, scale: Callable[[float], float] = float
) -> list[tuple[int, float]]:
    return [(row["step"], scale(row[name])) for row in rows if row.get(name) is not None]


def _of_dataset(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    found = [(row["step"], row.get("eval_datasets", {}).get(name, {}).get("loss")) for row in rows]
    return [(step, loss) for step, loss in found if loss is not None]


def _figure(title: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> go.Figure:
    """Lines over steps; markers where there are few points."""
    figure = go.Figure()
    for name, points in lines.items():
        if points:
            steps, values = zip(*thin(points), strict=True)
            mode = "lines+markers" if len(points) < 30 else "lines"
            figure.add_scatter(x=steps, y=values, mode=mode, name=name)
    return figure.update_layout(xaxis_title="step", yaxis_title=title, showlegend=True)


def _profile(facts: Mapping[str, Any]) -> str:
    """Where the time of a GPU's step went, where `profiler_steps` recorded some."""
    if "class_ms" not in facts:
        return ""
    step_ms = facts["step_ms"]
    times = {**facts["class_ms"], "nothing runs": step_ms - facts["busy_ms"]}
    rows = [[kind, f"{ms:.1f}", percent(ms, step_ms)] for kind, ms in times.items() if ms > 0]
    words = f"{step_ms:.0f} ms a step, of {plural(facts['steps'], 'step')} from step {facts['first_step']}"
    if facts["class_ms"]["communication"] > 0:
        words += f"; {facts['communication_alone_ms']:.1f} ms in which only communication ran"
    if facts.get("host_copies_alone_ms", 0.0) >= 0.05:  # every run copies its figures
        words += f"; {facts['host_copies_alone_ms']:.1f} ms in which only copies to or from the host ran"
    return section("Where a step's time goes", soft(words) + table(["kind", "ms", "of a step"], rows))


def _data(seen: Seen) -> str:
    """What was trained on, and what could not be."""
    run, steps = seen.run, seen.steps
    tokens, targets = sum(row["tokens"] for row in steps), sum(row["target_tokens"] for row in steps)
    words = f"{number(tokens)} tokens in the logged steps, {percent(targets, tokens)} of them trained. "
    if run.rejected_file.exists():
        with open(run.rejected_file, "rb") as file:
            words += f"{plural(sum(1 for _ in file), 'rejected row')} in rejected.jsonl. "
    if run.data_page.exists():
        words += "data.html, beside this page, shows the rows themselves."
    if not run.data_plan_file.exists():
        return section("Data", soft(words))
    plan = DataPlan.from_json(read_json(run.data_plan_file))
    heads = ["dataset", "format", "rows", "held out", "tokens a row", "weight"]
    rows = [
        [
            source.name,
            source.type,
            f"{source.num_rows:,}",
            "all" if source.evaluation_only else f"{source.held_out_rows:,}",
            f"{source.tokens_per_row:,.1f}",
            "" if source.weight is None else f"{source.weight:g}",
        ]
        for source in plan.sources
    ]
    return section("Data", soft(words), table(heads, rows, kind="words"))


def _completions(seen: Seen) -> str:
    rows = [
        [row["stage"], row["step"], row["prompt"], row["completion"]] for row in seen.run.read_completions()
    ]
    if not rows:
        return ""
    return section("Completions", table(["stage", "step", "prompt", "completion"], rows, kind="words"))


def _configuration(config: Mapping[str, Any]) -> str:
    lines = yaml.safe_dump({k: v for k, v in config.items() if v is not None}, sort_keys=False).splitlines()
    shown = "\n".join(map(text, lines))
    return section("Configuration", soft("With defaults and overrides."), f"<pre>{shown}</pre>")


def write(place: str, output: str | None) -> str:
    """Write the page of what lies at `place`; returns where. Raises ConfigError, OSError."""
    from nemo_ray.tune.report import page_of, write_report

    if output is not None and Path(output).is_dir():
        raise ConfigError(f"--output: {output or '.'} is a folder; name a file")
    with see_sweep(place) as folder:
        if folder is not None:
            if output is not None:
                publish_bytes(output, page_of(folder).encode())
                return output
            write_report(folder)
            return folder.shown(folder.report_file)
    with see(place) as seen:
        where = output or seen.run.shown(seen.run.report_file)
        publish_bytes(where, run_page(seen).encode())
    return where


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parser().parse(arguments)
    try:
        print(f"report: {write(given.output_dir, given.output)}")
    except NemoRayError as error:
        return tell(error)
    except OSError as error:
        return tell(StorageError(f"the report of {given.output_dir} cannot be written: {error}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
