"""A chat template that treats history as Nemotron's does: reasoning before the last user turn is dropped."""

from pathlib import Path
from typing import Any

from nemo_ray.config.schema import DatasetSpec
from nemo_ray.data.encode import Encoder, Sample
from nemo_ray.data.formats import format_of
from nemo_ray.data.template import RowError
from nemo_ray.data.tokenizer import TOKENIZER_DEFAULT, TokenizerSpec, load_tokenizer

_TEMPLATE = """\
{%- set truncates = truncate_history_thinking if truncate_history_thinking is defined else true -%}
{%- set thinks = enable_thinking if enable_thinking is defined else true -%}
{%- set seen = namespace(last_user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set seen.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}
{{- '<|im_start|>system\n' -}}
{%- for tool in tools -%}{{- tool | tojson + '\n' -}}{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\n' -}}
OPEN
{%- if message.reasoning_content and not (truncates and loop.index0 < seen.last_user) -%}
{{- '<think>\n' + message.reasoning_content + '\n</think>\n' -}}
{%- else -%}
{{- '<think></think>' -}}
{%- endif -%}
{{- message.content | default('', true) | trim -}}
{%- for call in message.tool_calls | default([], true) -%}
{{- '\n<tool_call>\n<function=' + call.function.name + '>\n' -}}
{%- for name, value in call.function.arguments | items -%}
{{- '<parameter=' ~ name ~ '>\n' ~ value ~ '\n</parameter>\n' -}}
{%- endfor -%}
{{- '</function>\n</tool_call>\n' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
CLOSE
{{- '\n' -}}
{%- elif message.role == 'tool' -%}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response>\n<|im_end|>\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' + ('<think>\n' if thinks else '<think></think>') -}}
{%- endif -%}
"""

UNMARKED = _TEMPLATE.replace("OPEN\n", "").replace("CLOSE\n", "")
"""Without generation marks, as NVIDIA publishes its own."""

MARKED = _TEMPLATE.replace("OPEN", "{%- generation -%}").replace("CLOSE", "{%- endgeneration -%}")


def encoder(folder: Path, template: str = TOKENIZER_DEFAULT, inputs: bool = False, **spec: Any) -> Encoder:
    """What prepare.py makes for a dataset with these keys."""
    entry = DatasetSpec.model_validate({"path": "x", **spec})
    loaded = load_tokenizer(TokenizerSpec(str(folder), template, ()))
    return Encoder(loaded, format_of(entry).reader(entry, loaded, inputs))


def samples_of(made: Encoder, row: Any) -> list[Sample]:
    (result,) = made.encode([row])
    assert not isinstance(result, RowError), result
    return result


def rejected(made: Encoder, row: Any) -> RowError:
    (result,) = made.encode([row])
    assert isinstance(result, RowError), result
    return result


def trained_text(made: Encoder, sample: Sample) -> str:
    decode = made.loaded.tokenizer.decode
    return decode(sample.ids[sample.targets == 1].tolist(), skip_special_tokens=False)


def whole_text(made: Encoder, sample: Sample) -> str:
    return made.loaded.tokenizer.decode(sample.ids.tolist(), skip_special_tokens=False)
