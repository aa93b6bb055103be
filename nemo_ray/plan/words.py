"""How a plan is told in the terminal."""

from collections.abc import Mapping
from typing import Any

from nemo_ray.plan.gpus import GIB

_INDENT = " " * 10


def lines(found: Mapping[str, Any]) -> list[str]:
    """The plan that __main__.plan made, a line each."""
    return [*_model(found), "", *_memory(found["memory"]), "", *_time(found), "", *_options(found)]


def _model(found: Mapping[str, Any]) -> list[str]:
    model, gpu, mesh = found["model"], found["gpu"], found["mesh"]
    total, active, trained = (_count(model[name]) for name in ("parameters", "active", "trained"))
    return [
        f"model     {model['shape']}: {total} parameters, {active} of them met by a token; {trained} trained "
        f"({model['trained_share']:.2%})",
        _INDENT + ", ".join(f"{name} {_count(count)}" for name, count in model["by_kind"].items()),
        f"on        {gpu['count']} x {gpu['name']} of {gpu['memory_bytes'] / GIB:.1f} GiB, "
        f"mesh {mesh['replicate']} x {mesh['shard']} (replicate x shard)",
    ]


def _memory(memory: Mapping[str, Any]) -> list[str]:
    fits = "fits" if memory["fits"] else "does not fit"
    said = [f"memory    {memory['peak'] / GIB:6.1f} GiB on each GPU at the worst moment: {fits}"]
    classes = sorted(memory["classes"].items(), key=lambda item: item[1], reverse=True)
    said += [f"{_INDENT}{size / GIB:6.1f}     {name}" for name, size in classes if size >= GIB / 20]
    most = memory["most_micro_batch_tokens"]
    if most:
        said.append(f"{_INDENT}{memory['micro_batch_tokens']:,} tokens a micro-batch; {most:,} fit")
    else:
        fewest = memory["fewest_gpus"] or "more than 64"
        said.append(f"{_INDENT}no micro-batch fits; {fewest} such GPUs hold it together")
    return said


def _time(found: Mapping[str, Any]) -> list[str]:
    speed, data = found["speed"], found["data"]
    if speed["tokens_per_s"] is None:
        return [f"speed     not known: {speed['from']}"]
    hours = data["seconds"] / 3600
    amount = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes"
    cost = f", {data['cost']:,.2f}" if data["cost"] is not None else ""
    what = f"{data['tokens']:,.0f} tokens" if data["known"] else f"each {data['per']}"
    return [
        f"speed     {speed['tokens_per_s']:,.0f} tokens/s ({speed['from']})",
        f"time      {amount}{cost} for {what}",
    ]


def _options(found: Mapping[str, Any]) -> list[str]:
    priced = found["data"]["cost"] is not None
    heads = f"{'mesh':>8}{'GiB':>8}{'fits':>7}{'most tokens':>13}{'tokens/s':>11}{'hours/100 M':>13}"
    said = [f"options   {'':12}{heads}" + (f"{'cost/100 M':>12}" if priced else "")]
    for option in found["options"]:
        mesh, fits = option["mesh"], "yes" if option["fits"] else "no"
        row = f"{_INDENT}{option['name']:<12}{mesh['replicate']:>4} x {mesh['shard']}"
        row += f"{option['peak'] / GIB:>8.1f}{fits:>7}{option['most_micro_batch_tokens']:>13,}"
        row += _cell(option["tokens_per_s"], 11, ",.0f") + _cell(option["hours_of_100m_tokens"], 13, ".2f")
        if priced:
            row += _cell(option["cost_of_100m_tokens"], 12, ",.2f")
        said.append(row + ("  <- recommended" if option["recommended"] else ""))
    best = next((option for option in found["options"] if option["recommended"]), None)
    if best is None:
        said.append(f"{_INDENT}none of them fits: more GPUs, a shorter sequence_len, or less to train")
    elif best["keys"]:
        keys = " ".join(f"{name}={str(value).lower()}" for name, value in best["keys"].items())
        said.append(f"{_INDENT}as {keys}")
    return said


def _cell(figure: float | None, width: int, form: str) -> str:
    return f"{'' if figure is None else format(figure, form):>{width}}"


def _count(number: int) -> str:
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return str(number)
