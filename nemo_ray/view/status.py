"""`nemo-ray status OUTPUT_DIR`: one screen of a run's state, or of a sweep's, from its directory."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_ray.config.command_line import CommandParser
from nemo_ray.errors import NemoRayError, StorageError, tell
from nemo_ray.view.seen import RUNNING, UNSEEN, Seen, see, see_sweep

if TYPE_CHECKING:
    from nemo_ray.tune.sweep_dir import SweepDir

EPILOG = """\
exit codes: 0 the run goes on or has finished, 1 it failed, was stopped or broke off, 2 there is none
"""
_SHOWN_EVENTS = 8


def parser() -> CommandParser:
    """The command line."""
    result = CommandParser(
        prog="nemo-ray status",
        description="Show the state of a run or a sweep, from anywhere its directory can be read.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("output_dir", metavar="OUTPUT_DIR", help="its output_dir, a folder or a URL")
    result.add_argument("--json", action="store_true", help="print one JSON object instead")
    return result


def summarize(seen: Seen) -> dict[str, Any]:
    """The state as JSON has it: figures in base units, null where they are not known."""
    steps, evaluations, best = seen.steps, seen.evaluations, seen.best
    last = steps[-1] if steps else {}
    return {
        "output_dir": seen.run.place,
        "state": seen.state,
        "phase": seen.progress.get("phase") if seen.goes_on else None,
        "step": last.get("step", 0),
        "max_steps": seen.progress.get("max_steps"),
        "eta_s": seen.progress.get("eta_s") if seen.goes_on else None,
        "loss": last.get("loss"),
        "first_eval_loss": evaluations[0]["eval_loss"] if evaluations else None,
        "eval_loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "best_eval_loss": best["eval_loss"] if best else None,
        "best_step": best["step"] if best else None,
        "tokens_per_s": seen.recent("tokens_per_s"),
        "step_s": seen.recent("step_s"),
        "data_wait_share": seen.waiting_share,
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in steps), default=None),
        "nonfinite_steps": last.get("nonfinite_steps", 0),
        "checkpoints": seen.run.checkpoint_steps(),
        "restarts": sum(failure["restart"] for failure in seen.failures),
        "events": [{"time": event.time, "what": event.what} for event in seen.events()],
    }


def rows_of(seen: Seen) -> list[tuple[str, str]]:
    """The screen, as names and values."""
    from nemo_ray.train.progress import status_line
    from nemo_ray.train.summary import gib, plural

    facts, known = seen.facts, summarize(seen)
    state = known["state"]
    if seen.holder is not None and state in (RUNNING, UNSEEN):
        state += f", by {seen.holder}"
    rows = [("run", seen.run.place), ("state", state)]
    if facts.get("error"):
        rows.append(("error", facts["error"]))
    config, model = facts.get("config", {}), facts.get("model")
    kind = (
        f"{config['adapter']}, r={config['lora_r']}" if config.get("adapter") else "all weights are trained"
    )
    size = f"; {model['trainable']:,} of {model['total']:,} parameters" if model else ""
    rows.append(("model", f"{config.get('base_model')}; {kind}{size}"))
    if seen.goes_on and seen.progress:
        rows.append(("now", status_line(seen.progress)))
    if known["step"]:
        total = f" of {known['max_steps']}" if known["max_steps"] else ""
        loss = "not finite" if known["loss"] is None else f"{known['loss']:.4f}"
        rows.append(("steps", f"{known['step']}{total}, last loss {loss}"))
    if known["eval_loss"] is not None:
        text = f"{known['first_eval_loss']:.4f} first, {known['eval_loss']:.4f} last"
        if seen.best is not None:
            text += f", best {known['best_eval_loss']:.4f} at step {known['best_step']}"
        rows.append(("held-out", text))
    if known["tokens_per_s"] is not None:
        wait = f"{known['data_wait_share']:.1%} of the time without data"
        rows.append(
            (
                "speed",
                f"{known['tokens_per_s']:,.0f} tokens/s, {known['step_s']:.3g} s a step; {wait}",
            )
        )
        rows.append(("memory", f"{gib(known['peak_memory_bytes'])} at most, on rank 0"))
    if known["nonfinite_steps"]:
        rows.append(
            ("skipped", f"{plural(known['nonfinite_steps'], 'step')} without a finite loss or gradient")
        )
    mesh = facts.get("mesh")
    if mesh:
        rows.append(
            (
                "workers",
                f"{facts['world_size']}, mesh {mesh['replicate']} x {mesh['shard']} (replicate x shard)",
            )
        )
    checkpoints = ", ".join(f"step-{step}" for step in known["checkpoints"][-3:])
    rows.append(("checkpoints", checkpoints or "none"))
    for name, path in (("adapter", seen.run.adapter_dir), ("model", seen.run.model_dir)):
        if path.exists():
            rows.append((name, seen.run.shown(path)))
    events = seen.events()
    if len(events) > _SHOWN_EVENTS:
        rows.append(("events", f"the last {_SHOWN_EVENTS} of {len(events)}; nemo-ray report has all"))
    for index, event in enumerate(events[-_SHOWN_EVENTS:]):
        name = "events" if index == 0 and len(events) <= _SHOWN_EVENTS else ""
        rows.append((name, f"{event.time}  {event.what}" if event.time else event.what))
    return rows


def show_sweep(folder: "SweepDir", as_json: bool) -> int:
    """The same for a sweep."""
    from rich.console import Console

    from nemo_ray.tune.course import best_of
    from nemo_ray.tune.library import result_of

    facts, found = folder.read(), result_of(folder)
    ended = {trial.number: trial for trial in found.trials}
    best = best_of((trial.end for trial in found.trials), facts["tune"]["mode"])
    state = facts.get("outcome", "running or broken off")
    if as_json:
        trials = [
            {
                "number": n,
                "status": t.end.status,
                "value": t.value,
                "step": t.end.step,
                "params": dict(t.params),
            }
            for n, t in ended.items()
        ]
        print(
            json.dumps({"output_dir": folder.place, "state": state, "best": best, "trials": trials}, indent=2)
        )
        return 0
    print(f"sweep {folder.place}: {state}, {len(ended)} of {len(facts['trials'])} trials have ended")
    frame = found.dataframe.dropna(axis="columns", how="all")
    if len(frame):
        shown = frame.astype(object).where(frame.notna(), "")  # pandas writes None and NaN
        Console(soft_wrap=True).print(shown.to_string(index=False), highlight=False, markup=False)
    if best is not None:
        print(f"best: trial {best}, {found.metric} {ended[best].value:.4f}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parser().parse(arguments)
    try:
        return show(given.output_dir, given.json)
    except NemoRayError as error:
        return tell(error)
    except BrokenPipeError:  # whoever read on, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return tell(StorageError(f"{given.output_dir} cannot be read: {error}"))


def show(place: str, as_json: bool) -> int:
    """Print the state of what lies at `place`. Raises ConfigError, OSError."""
    with see_sweep(place) as folder:
        if folder is not None:
            return show_sweep(folder, as_json)
    with see(place) as seen:
        if as_json:
            print(json.dumps(summarize(seen), indent=2))
        else:
            from rich.console import Console

            from nemo_ray.train.summary import print_rows

            print_rows(Console(), rows_of(seen))
        return 0 if seen.goes_on or seen.state == "finished" else 1


if __name__ == "__main__":
    sys.exit(main())
