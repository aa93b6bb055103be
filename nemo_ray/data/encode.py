"""Rows to samples: token ids and which of them are targets.

Text is encoded in pieces that are cut where cutting changes no id (next to special tokens), so that a piece
is a target wholly, or not at all, or after a header whose ids are known. Where that cannot be shown, the
piece is encoded with character offsets and masked by them, as transformers does: slower, equally exact.

    <|im_start|>user\\nHow?<|im_end|>\\n<|im_start|> | assistant\\nLike this.<|im_end|> | \\n
                       none                          header      target                  none
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.packing import Int32
from nemo_ray.data.template import ChatTemplate, Rendered, RowError, chat_template
from nemo_ray.data.tokenizer import LoadedTokenizer
from nemo_ray.errors import ConfigError

Mask = npt.NDArray[np.uint8]
Spans = tuple[tuple[int, int], ...]

_ROLES = {"human": "user", "gpt": "assistant"}
"""Role names of the sharegpt format."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names a message's reasoning goes by; templates read the first."""

_NUM_PROVEN = 2
"""Rows of each batch that are encoded whole as well, to see that cutting changes nothing."""

_LONGEST_HEADER = 64


class Sample(NamedTuple):
    """One row's tokens: ids (n,) int32, targets (n,) 0 or 1."""

    ids: Int32
    targets: Mask


class Piece(NamedTuple):
    """Part of a row's text, encoded by itself; `targets` are character spans in it."""

    text: str
    targets: Spans


def cut(rendered: Rendered, cut_tokens: tuple[str, ...]) -> list[Piece]:
    """Cut the text as near before the targets' ends as cut tokens allow; the pieces joined are the text."""
    text = rendered.text
    cuts = [0]
    if cut_tokens:
        for boundary in (position for span in rendered.targets for position in span):
            last = cuts[-1]
            if text.endswith(cut_tokens, last, boundary) or text.startswith(cut_tokens, boundary):
                place = boundary
            else:
                ends = ((text.rfind(token, last, boundary), len(token)) for token in cut_tokens)
                place = max((start + length for start, length in ends if start >= 0), default=last)
            if last < place < len(text):
                cuts.append(place)
    pieces = []
    following = 0  # the first target that does not end before the piece
    for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True):
        inside = []
        at = following
        while at < len(rendered.targets) and rendered.targets[at][0] < stop:
            first, last = rendered.targets[at]
            inside.append((max(first, start) - start, min(last, stop) - start))
            at += 1
        following = at - 1 if inside and rendered.targets[at - 1][1] > stop else at
        pieces.append(Piece(text[start:stop], tuple(inside)))
    return pieces


@dataclass
class Encoder:
    """Turns one source's rows into samples."""

    loaded: LoadedTokenizer
    spec: DatasetSpec
    train_on_inputs: bool

    def __post_init__(self) -> None:
        self._headers: dict[str, list[int]] = {}
        self.cut_tokens = self.loaded.cut_tokens
        self.template: ChatTemplate | None = None
        if self.spec.type == "chat_template":
            if self.loaded.chat_template is None:
                raise ConfigError(
                    "chat_template: the base model's tokenizer has none; name a .jinja file, or use "
                    "type: completion"
                )
            self.template = chat_template(
                self.loaded.chat_template, self.loaded.special_tokens, self.loaded.cut_tokens
            )

    def encode(self, rows: Iterable[Any | RowError]) -> list[Sample | RowError]:
        """One sample, or the reason why there is none, for each row (decoded JSON or parquet)."""
        if self.template is None:
            return self._encode_texts([row if isinstance(row, RowError) else self._text(row) for row in rows])
        template = self.template
        rendered = [row if isinstance(row, RowError) else self._render(template, row) for row in rows]
        return self._encode_chats(rendered)

    # -- rows to text -----------------------------------------------------------------------------

    def _text(self, row: Any) -> str | RowError:
        try:
            text = _field(row, self.spec.field)
            if not isinstance(text, str):
                raise RowError(f"field {self.spec.field!r} is no text")
            if not text:
                raise RowError(f"field {self.spec.field!r} is empty")
            return _encodable(text)
        except RowError as rejected:
            return rejected

    def _render(self, template: ChatTemplate, row: Any) -> Rendered | RowError:
        try:
            rendered = template.render(self.messages(row), row.get("tools") or None)
            _encodable(rendered.text)
        except RowError as rejected:
            return rejected
        return rendered._replace(targets=((0, len(rendered.text)),)) if self.train_on_inputs else rendered

    def messages(self, row: Any) -> list[dict[str, Any]]:
        """The conversation as templates want it. Raises RowError."""
        name = self.spec.field_messages
        value = _field(row, name)
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(message, dict) for message in value)
        ):
            raise RowError(f"field {name!r} is no list of messages")
        return [self._message(message) for message in value]

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        mappings = self.spec.message_property_mappings
        renamed = set(mappings.values())
        result = {name: value for name, value in message.items() if name not in renamed and value is not None}
        for name, source in mappings.items():
            if message.get(source) is not None:
                result[name] = message[source]
        role = result.get("role")
        if not isinstance(role, str):
            raise RowError(f"a message has no {mappings.get('role', 'role')!r}")
        if "content" not in result and "tool_calls" not in result:
            raise RowError(f"a message has no {mappings.get('content', 'content')!r}")
        result["role"] = _ROLES.get(role, role)
        reasoning = next((result[name] for name in _REASONING if name in result), None)
        return (
            result if reasoning is None else {"thinking": reasoning, **result, "reasoning_content": reasoning}
        )

    # -- text to ids ------------------------------------------------------------------------------

    def _encode_texts(self, texts: Sequence[str | RowError]) -> list[Sample | RowError]:
        """`completion`: the tokenizer's own special tokens, then eos; every token is a target."""
        good = [text for text in texts if isinstance(text, str)]
        encodings = iter(self.loaded.tokenizer.encode_batch_fast(good, add_special_tokens=True))
        eos = self.loaded.eos_id
        samples: list[Sample | RowError] = []
        for text in texts:
            if isinstance(text, RowError):
                samples.append(text)
                continue
            ids = next(encodings).ids
            if eos is not None and (not ids or ids[-1] != eos):
                ids.append(eos)
            samples.append(Sample(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.uint8)))
        return samples

    def _encode_chats(self, rows: Sequence[Rendered | RowError]) -> list[Sample | RowError]:
        self._prove([row for row in rows if isinstance(row, Rendered)][:_NUM_PROVEN])
        cuts = [cut(row, self.cut_tokens) if isinstance(row, Rendered) else [] for row in rows]
        texts = [piece.text for pieces in cuts for piece in pieces]
        encodings = iter(self.loaded.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        samples: list[Sample | RowError] = []
        for row, pieces in zip(rows, cuts, strict=True):
            if isinstance(row, RowError):
                samples.append(row)
                continue
            sample = self._join(pieces, [next(encodings) for _ in pieces])
            samples.append(sample if sample.targets[1:].any() else RowError("no trained token"))
        return samples

    def _join(self, pieces: Sequence[Piece], encodings: Sequence[Encoding]) -> Sample:
        ids: list[int] = []
        mask = bytearray()
        for piece, encoding in zip(pieces, encodings, strict=True):
            piece_ids = encoding.ids
            ids += piece_ids
            mask += self._mask(piece, piece_ids)
        return Sample(np.array(ids, dtype=np.int32), np.frombuffer(bytes(mask), dtype=np.uint8))

    def _mask(self, piece: Piece, ids: list[int]) -> bytes:
        """One byte for each id of the piece: 1 where it is a target."""
        if not piece.targets:
            return bytes(len(ids))
        (start, stop), *more = piece.targets
        if not more and stop == len(piece.text):
            if start == 0:
                return b"\1" * len(ids)
            if start <= _LONGEST_HEADER and self.loaded.byte_exact:
                header = self._header(piece.text[:start])
                if ids[: len(header)] == header:
                    return bytes(len(header)) + b"\1" * (len(ids) - len(header))
        return _mask_by_offsets(
            self.loaded.untrimmed.encode(piece.text, add_special_tokens=False), piece.targets
        )

    def _header(self, text: str) -> list[int]:
        ids = self._headers.get(text)
        if ids is None:
            ids = self.loaded.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._headers) < 10_000:
                self._headers[text] = ids
        return ids

    def _prove(self, rows: Sequence[Rendered]) -> None:
        """Give up cutting if a row cut into pieces does not encode to what the whole row encodes to."""
        tokenizer = self.loaded.tokenizer
        for row in rows:
            pieces = [piece.text for piece in cut(row, self.cut_tokens)]
            encodings = tokenizer.encode_batch_fast([row.text, *pieces], add_special_tokens=False)
            if encodings[0].ids != [token for encoding in encodings[1:] for token in encoding.ids]:
                self.cut_tokens = ()


def _field(row: Any, name: str) -> Any:
    if not isinstance(row, dict):
        raise RowError("the row is no object")
    if row.get(name) is None:
        raise RowError(f"no field {name!r}")
    return row[name]


def _encodable(text: str) -> str:
    """JSON can hold halves of characters (lone surrogates), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("invalid Unicode", str(error)) from None
    return text


def _mask_by_offsets(encoding: Encoding, targets: Spans) -> bytes:
    """Tokens from the first to the last one that holds a character of a target are targets."""
    mask = bytearray(len(encoding.ids))
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    for start, stop in targets:
        inside = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))
        if inside.size:
            first, last = int(inside[0]), int(inside[-1])
            mask[first : last + 1] = b"\1" * (last + 1 - first)
    return bytes(mask)
