"""The first rows of each dataset as the model will see them, and what becomes of a few hundred of them.

Owns what is looked at before anything is prepared. How it is printed is show.py's and page.py's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from nemo_ray.config.schema import DataSection
from nemo_ray.data.encode import Sample
from nemo_ray.data.formats import format_of
from nemo_ray.data.manifest import DataPlan
from nemo_ray.data.prepare import WindowTask, encode_rows, pack_rows, read_rows, window_task
from nemo_ray.data.shards import ShardStats
from nemo_ray.data.template import RowError
from nemo_ray.data.tokenizer import load_tokenizer

PROBED_ROWS = 256

_SHOWN_TOKENS, _SHOWN_LAST = 3_000, 1_000
"""Of a longer document: its beginning, and its end."""
_CHARACTER_TOKENS = 8
"""That one character may need."""


class Token(NamedTuple):
    """Text of one token, or of several that are characters only together."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool

    def to_json(self) -> list[Any]:
        """A JSON-ready list, in the order of the fields."""
        return [self.text, list(self.ids), self.trained, self.special]


class Example(NamedTuple):
    """One document: its tokens, or why its row is rejected.

    Of a long one `tokens` are its beginning and `last` its end, with `left_out` tokens between.
    """

    file: str
    row: int
    part: str
    """Which of the row's documents, in words; empty where it is the only one."""
    tokens: tuple[Token, ...]
    last: tuple[Token, ...]
    num_tokens: int
    num_trained: int
    rejected: str
    """Reason and detail; empty for a row that can be used."""
    too_long: str
    """What happens to one longer than sequence_len: "dropped", "cut" or "split"; empty for others."""

    @property
    def place(self) -> str:
        """File, row, and which of the row's documents."""
        return f"{self.file} row {self.row}{self.part and ', '}{self.part}"

    @property
    def left_out(self) -> int:
        """How many tokens stand between those that are shown."""
        return self.num_tokens - sum(len(token.ids) for token in (*self.tokens, *self.last))

    def shortened(self, room: int) -> "Example":
        """With at most about `room` tokens: two thirds from the beginning, a third from the end."""
        if len(self.tokens) + len(self.last) <= room:
            return self
        head = room * 2 // 3
        return self._replace(tokens=self.tokens[:head], last=(self.last or self.tokens)[head - room :])

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        shown = {
            "tokens": [token.to_json() for token in self.tokens],
            "last": [token.to_json() for token in self.last],
        }
        return {**self._asdict(), **shown, "place": self.place, "left_out": self.left_out}


class Probe(NamedTuple):
    """The first rows of one dataset."""

    source: int
    examples: tuple[Example, ...]
    stats: ShardStats
    """What becomes of the first rows, as if they were a window of their own."""


def probe_sources(plan: DataPlan, data: DataSection, base_model: str, count: int) -> list[Probe]:
    """`count` examples of each source, and the statistics of its first 256 rows."""
    probes: list[Probe] = []
    for held_out, windows in ((False, plan.windows), (True, plan.eval_windows)):
        for window in windows:
            if any(probe.source == window.source for probe in probes):
                continue
            task = window_task(plan, window, data, base_model, held_out=held_out)
            rows = read_rows(task)[: max(PROBED_ROWS, count)]
            results = encode_rows(rows, task.spec, task.tokenizer, task.train_on_inputs)
            examples = [
                example
                for index, result in enumerate(results[:count])
                for example in _examples(result, *plan.locate(window, index), task)
            ]
            probes.append(Probe(window.source, tuple(examples), pack_rows(results, task).stats))
    return sorted(probes, key=lambda probe: probe.source)


def _examples(result: list[Sample] | RowError, file: str, row: int, task: WindowTask) -> list[Example]:
    """The documents of one row."""
    if isinstance(result, RowError):
        reason = result.reason + (f" ({result.detail})" if result.detail else "")
        return [Example(file, row, "", (), (), 0, 0, reason, "")]
    excess = "split" if format_of(task.spec).splits else "cut" if task.truncate else "dropped"
    tokenizer = load_tokenizer(task.tokenizer).tokenizer
    examples = []
    for number, sample in enumerate(result, start=1):
        part = f"document {number} of {len(result)}" if len(result) > 1 else ""
        too_long = excess if len(sample.ids) > task.sequence_len else ""
        shown = _shown(sample, tokenizer)
        trained = int((sample.targets[1:] != 0).sum())
        examples.append(Example(file, row, part, *shown, len(sample.ids), trained, "", too_long))
    return examples


def _shown(sample: Sample, tokenizer: Tokenizer) -> tuple[tuple[Token, ...], tuple[Token, ...]]:
    """All tokens of a sample and none, or the beginning and the end of a long one."""
    if len(sample.ids) <= _SHOWN_TOKENS + _SHOWN_LAST:
        return tuple(token_texts(sample, tokenizer)), ()
    # Read a little further on both sides, where a character may be cut in two.
    head, tail = slice(_SHOWN_TOKENS + _CHARACTER_TOKENS), slice(-_SHOWN_LAST - _CHARACTER_TOKENS, None)
    first = token_texts(Sample(sample.ids[head], sample.targets[head]), tokenizer)
    last = token_texts(Sample(sample.ids[tail], sample.targets[tail]), tokenizer)
    return tuple(first[:-_CHARACTER_TOKENS]), tuple(last[_CHARACTER_TOKENS:])


def token_texts(sample: Sample, tokenizer: Tokenizer) -> list[Token]:
    """The sample's tokens with the text that each adds to what stands before it."""
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids: list[int] = sample.ids.tolist()
    trained: list[bool] = (sample.targets != 0).tolist()
    tokens: list[Token] = []
    context = start = 0
    for stop in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[context:start])
        text = _decode(tokenizer, ids[context:stop])[len(before) :]
        # A character may need several tokens; but no special one, and none of another kind, is part of it.
        following = stop < len(ids) and ids[stop] not in special and trained[stop] == trained[stop - 1]
        if text.endswith("\ufffd") and following and stop - start < _CHARACTER_TOKENS:
            continue
        tokens.append(Token(text, tuple(ids[start:stop]), trained[start], ids[start] in special))
        context, start = start, stop
    return tokens


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))
