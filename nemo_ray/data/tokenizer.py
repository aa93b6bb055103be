"""The base model's tokenizer, read from its folder with `tokenizers` alone (no transformers, no torch).

Owns: tokenizer.json and its companions -> ids of special tokens, the chat template's text, and the special
tokens at which text may be cut without changing a single id. What is encoded is encode.py's.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from nemo_ray.config.schema import DataSection, DatasetSpec
from nemo_ray.data.manifest import digest
from nemo_ray.errors import ConfigError
from nemo_ray.hub import is_reference, local_folder

TOKENIZER_DEFAULT = "tokenizer_default"


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer and template; small, picklable and hashable: each process loads them once."""

    folder: str
    """Absolute, or a hub reference, which each node resolves to a folder of its own."""
    chat_template: str
    special_tokens: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, data: DataSection, base_model: str) -> "TokenizerSpec":
        """The tokenizer that a run's configuration names; paths become absolute."""
        folder = base_model if is_reference(base_model) else str(Path(base_model).expanduser().absolute())
        return cls(folder, _absolute(data.chat_template), tuple(sorted(data.special_tokens.items())))

    def for_dataset(self, spec: DatasetSpec) -> "TokenizerSpec":
        """The same with the dataset's chat template, where it has one of its own."""
        if spec.chat_template is None:
            return self
        return replace(self, chat_template=_absolute(spec.chat_template))


def _absolute(template: str) -> str:
    return template if template == TOKENIZER_DEFAULT else str(Path(template).expanduser().absolute())


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer ready to encode, with what templates and packs need of it."""

    spec: TokenizerSpec
    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    """Name -> text, as chat templates see them (bos_token, eos_token, ...)."""
    chat_template: str | None
    pad_id: int
    eos_id: int | None
    cut_tokens: tuple[str, ...]
    """Special tokens next to which the text can be cut: both parts encode to the ids of the whole."""
    byte_exact: bool
    """Byte-level without normalization: equal leading ids cover equal leading text."""
    identity: str

    @cached_property
    def untrimmed(self) -> Tokenizer:
        """The same without its post-processor, which adds tokens and trims white space off offsets."""
        definition = json.loads(self.tokenizer.to_str())
        definition["post_processor"] = None
        return Tokenizer.from_str(json.dumps(definition))

    @cached_property
    def num_ids(self) -> int:
        """One more than the largest token id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after a text of its own accord."""
        bare = self.tokenizer.encode("a", add_special_tokens=False).ids
        whole = self.tokenizer.encode("a", add_special_tokens=True).ids
        starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        if not starts:
            raise ConfigError("base_model: its tokenizer changes a text's ids where special tokens are added")
        return whole[: starts[0]], whole[starts[0] + len(bare) :]


@lru_cache(maxsize=8)
def load_tokenizer(spec: TokenizerSpec) -> LoadedTokenizer:
    """Read the folder's tokenizer. Raises ConfigError naming the file that is missing or wrong."""
    folder = local_folder(spec.folder, weights=False)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            f"base_model: {folder} holds no tokenizer.json; give the folder of a model with a fast tokenizer"
        )
    text = file.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises a bare Exception
        raise ConfigError(
            f"base_model: {file} is not a tokenizer that tokenizers can read: {error}"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _read_object(folder / "tokenizer_config.json")
    special = _special_tokens(folder, settings)
    for name, token in spec.special_tokens:
        if tokenizer.token_to_id(token) is None:
            raise ConfigError(
                f"special_tokens.{name}: {token!r} is not in the tokenizer of {folder}; name one that is"
            )
        special[name] = token
    _register(tokenizer, settings, special)
    template = _template_text(spec, folder, settings)
    eos_id = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    pad_id = tokenizer.token_to_id(special["pad_token"]) if "pad_token" in special else eos_id
    if pad_id is None:
        raise ConfigError(
            f"special_tokens.pad_token: the tokenizer of {folder} has no pad and no eos token; name one"
        )
    definition = json.loads(text)
    return LoadedTokenizer(
        spec=spec,
        tokenizer=tokenizer,
        special_tokens=special,
        chat_template=template,
        pad_id=pad_id,
        eos_id=eos_id,
        cut_tokens=_cut_tokens(tokenizer, definition, template, special),
        byte_exact=_is_byte_exact(definition),
        identity=digest(text, sorted(special.items()), template, settings.get("added_tokens_decoder")),
    )


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"base_model: {path} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _token_text(value: object) -> str | None:
    """Special tokens are written as text, or as an object with their text as `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    named = {**_read_object(folder / "special_tokens_map.json"), **settings}
    texts = {name: _token_text(value) for name, value in named.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _register(tokenizer: Tokenizer, settings: dict[str, Any], special: dict[str, str]) -> None:
    """Make the tokens that the config files name special, as transformers does. Ids never change."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    wanted = [*special.values(), *(filter(None, map(_token_text, extra if isinstance(extra, list) else [])))]
    flags: dict[str, dict[str, bool]] = {}
    for token in (settings.get("added_tokens_decoder") or {}).values():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            names = ("lstrip", "rstrip", "single_word", "normalized", "special")
            flags[token["content"]] = {name: bool(token[name]) for name in names if name in token}
    for text in dict.fromkeys([*flags, *wanted]):
        if text not in known and tokenizer.token_to_id(text) is not None:
            options = flags.get(text, {"special": True, "normalized": False})
            added = AddedToken(text, **options)
            tokenizer.add_special_tokens([added]) if added.special else tokenizer.add_tokens([added])


def _template_text(spec: TokenizerSpec, folder: Path, settings: dict[str, Any]) -> str | None:
    if spec.chat_template != TOKENIZER_DEFAULT:
        path = Path(spec.chat_template)
        if not path.is_file():
            raise ConfigError(f"chat_template: {path} is not there; give tokenizer_default or a .jinja file")
        return path.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _cut_tokens(
    tokenizer: Tokenizer, definition: dict[str, Any], template: str | None, special: dict[str, str]
) -> tuple[str, ...]:
    """Special tokens that the template writes, matched by the tokenizer wherever they stand.

    Text on both sides of such a token is encoded by itself. That needs a token that neither strips its
    neighbours nor overlaps another, and a pre-tokenizer for which the beginning of the text is no special
    place.
    """
    if '"prepend_scheme": "first"' in json.dumps(definition.get("pre_tokenizer")):
        return ()
    added = list(tokenizer.get_added_tokens_decoder().values())
    texts = [token.content for token in added]
    usable = []
    for token in added:
        plain = not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        written = token.content in (template or "") or token.content in special.values()
        if token.special and plain and written and not any(_overlap(token.content, other) for other in texts):
            usable.append(token.content)
    return tuple(usable)


def _overlap(first: str, second: str) -> bool:
    """Can an occurrence of one share characters with an occurrence of the other, a different token?"""
    if first == second:
        return False
    if first in second or second in first:
        return True
    longest = min(len(first), len(second))
    return any(first[-size:] == second[:size] or second[-size:] == first[:size] for size in range(1, longest))


def _is_byte_exact(definition: dict[str, Any]) -> bool:
    pre_tokenizer = json.dumps(definition.get("pre_tokenizer"))
    return definition.get("normalizer") is None and '"ByteLevel"' in pre_tokenizer
