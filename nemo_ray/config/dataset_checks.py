"""Rules about what the rows of a dataset hold: chat templates, and the keys of each `type`.

Each function returns one line per problem, or per notice; it raises nothing.
"""

import os
import string
from collections.abc import Iterator

from nemo_ray.config.dataset_types import CHAT_TYPES, TYPE_KEYS
from nemo_ray.config.schema import Config, DatasetSpec
from nemo_ray.config.translate import show

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_CHOICES = ("roles_to_train", "message_field_training", "message_field_training_detail", "train_on_eos")
_FORMAT_FIELDS = {
    "format": {"instruction", "input"},
    "no_input_format": {"instruction"},
    "system_format": {"system"},
}


def _specs(config: Config) -> Iterator[tuple[str, DatasetSpec]]:
    for name, specs in (("datasets", config.datasets), ("test_datasets", config.test_datasets)):
        for index, spec in enumerate(specs):
            yield f"{name}.{index}", spec


def _given(spec: DatasetSpec, name: str) -> bool:
    """The key says something else than it does without being there."""
    return bool(getattr(spec, name) != DatasetSpec.model_fields[name].default)


def _templates(config: Config) -> Iterator[tuple[str, str]]:
    """(key, value) of every chat template that is named."""
    yield "chat_template", config.chat_template
    for key, spec in _specs(config):
        if spec.chat_template is not None:
            yield f"{key}.chat_template", spec.chat_template


def format_rules(config: Config) -> Iterator[str]:
    """What contradicts itself in the keys that shape rows."""
    for key, template in _templates(config):
        if template != "tokenizer_default" and not template.endswith((".jinja", ".jinja2")):
            yield (
                f"{key}: {show(template)} is not a file; give tokenizer_default, or the "
                "path of a .jinja file (named and inline templates are not built in)"
            )
    for name in config.chat_template_kwargs:
        if name in _RESERVED:
            yield f"chat_template_kwargs.{name}: is set for each row; remove it"
    for key, spec in _specs(config):
        yield from _spec_rules(config, key, spec)


def _spec_rules(config: Config, key: str, spec: DatasetSpec) -> Iterator[str]:
    for name in spec.chat_template_kwargs:
        if name in _RESERVED:
            yield f"{key}.chat_template_kwargs.{name}: is set for each row; remove it"
    names = [name for sources in spec.roles.values() for name in sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{key}.roles: {show(name)} stands for two roles; keep one"
    if spec.type in CHAT_TYPES and config.train_on_inputs:
        for name in _CHOICES:
            if _given(spec, name):
                yield (
                    f"{key}.{name}: contradicts train_on_inputs: true, which trains every token; remove one"
                )
    if not spec.roles_to_train and not (spec.message_field_training or spec.message_field_training_detail):
        yield (
            f"{key}.roles_to_train: [] trains nothing without message_field_training; set that, or name roles"
        )
    end, turn = spec.train_on_eos, spec.train_on_eot
    if None not in (end, turn) and end != turn and not (spec.eot_tokens or config.eot_tokens):
        yield (
            f"{key}.train_on_eot: {turn} contradicts train_on_eos: {end}, since without eot_tokens both are "
            "about the eos token; keep one, or name eot_tokens"
        )
    for name, known in _FORMAT_FIELDS.items():
        yield from _format_rules(f"{key}.{name}", getattr(spec, name), known)


def _format_rules(key: str, text: str, known: set[str]) -> Iterator[str]:
    """A prompt's wording must be a format of Python that names only what there is."""
    wanted = ", ".join(f"{{{name}}}" for name in sorted(known))
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        yield f"{key}: {show(text)} cannot be filled in ({error}); a brace of the text is written twice"
        return
    if not names <= known:
        yield f"{key}: {show(text)} names {', '.join(sorted(names - known))}; it can name {wanted}"


def format_notices(config: Config) -> Iterator[str]:
    """Keys of another type than the dataset's: they do nothing."""
    every = {name for names in TYPE_KEYS.values() for name in names}
    for key, spec in _specs(config):
        unused = sorted(name for name in every - set(TYPE_KEYS[spec.type]) if _given(spec, name))
        if unused:
            yield f"{', '.join(f'{key}.{name}' for name in unused)}: not read by type: {spec.type}"


def template_path_errors(config: Config) -> list[str]:
    """Templates that are named and not there."""
    return [
        f"{key}: {show(template)} is not a file; give the path of a .jinja file"
        for key, template in _templates(config)
        if template != "tokenizer_default" and not os.path.isfile(template)
    ]
