"""Examples for the eye: the first rows as the model will see them, trained tokens set off."""

from rich.console import Console
from rich.text import Text

from nemo_ray.config.schema import DataSection
from nemo_ray.data.encode import Sample
from nemo_ray.data.formats import format_of
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.prepare import WindowTask, encode_rows, read_rows, window_task
from nemo_ray.data.template import RowError
from nemo_ray.data.tokenizer import load_tokenizer

_TRAINED = "bold green"


def show_examples(plan: DataPlan, data: DataSection, base_model: str, count: int, console: Console) -> None:
    """Print the first `count` rows of each source. On a terminal trained tokens are green, else in «»."""
    seen: set[int] = set()
    for held_out, windows in ((False, plan.windows), (True, plan.eval_windows)):
        for window in windows:
            if window.source in seen:
                continue
            seen.add(window.source)
            task = window_task(plan, window, data, base_model, held_out=held_out)
            results = encode_rows(read_rows(task)[:count], task.spec, task.tokenizer, task.train_on_inputs)
            for index, result in enumerate(results):
                file, row = plan.locate(window, index)
                console.rule(Text(f"{file} row {row}"), align="left")
                _show(result, task, console)


def _show(result: list[Sample] | RowError, task: WindowTask, console: Console) -> None:
    if isinstance(result, RowError):
        console.print(
            Text(f"rejected: {result.reason}{f' ({result.detail})' if result.detail else ''}", style="red")
        )
        return
    for number, sample in enumerate(result, start=1):
        if len(result) > 1:
            console.print(Text(f"document {number} of {len(result)}", style="dim"))
        _show_sample(sample, task, console)


def _show_sample(sample: Sample, task: WindowTask, console: Console) -> None:
    targets = int((sample.targets[1:] != 0).sum())
    size = len(sample.ids)
    fate = ""
    if size > task.sequence_len:
        excess = "cut" if task.truncate else "dropped"
        if format_of(task.spec).splits:
            excess = "split"
        fate = f", longer than sequence_len {task.sequence_len}: {excess}"
    console.print(coloured(sample, task, console.is_terminal))
    console.print(
        Text(f"{size:,} tokens, {targets:,} trained ({targets / max(size, 1):.0%}){fate}", style="dim")
    )


def coloured(sample: Sample, task: WindowTask, terminal: bool) -> Text:
    """The sample's text; targets are styled, or bracketed where there are no colours."""
    decode = load_tokenizer(task.tokenizer).tokenizer.decode
    text = Text()
    ids, targets = sample.ids.tolist(), sample.targets.tolist()
    start = 0
    while start < len(ids):
        stop = start
        while stop < len(ids) and targets[stop] == targets[start]:
            stop += 1
        part = decode(ids[start:stop], skip_special_tokens=False)
        if targets[start] and not terminal:
            part = f"«{part}»"
        text.append(part, style=_TRAINED if targets[start] else "")
        start = stop
    return text
