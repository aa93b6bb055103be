"""Lines that tell the user what of a dataset's samples is derived rather than given."""

from nemo_ray.config.dataset_types import CHAT_TYPES
from nemo_ray.config.schema import DataSection, DatasetSpec
from nemo_ray.data.template import chat_template
from nemo_ray.data.tokenizer import LoadedTokenizer

_FRAMED = ("completion", "pretrain", "alpaca", "prompt_completion")


def notices_of(spec: DatasetSpec, loaded: LoadedTokenizer, data: DataSection) -> list[str]:
    """The lines for one dataset; other datasets may give the same ones. Raises ConfigError."""
    notices = []
    if spec.type in CHAT_TYPES and loaded.chat_template is not None and not data.train_on_inputs:
        template = chat_template(loaded.chat_template, loaded.special_tokens, spec.chat_template_kwargs)
        if not template.marked:
            notices.append(
                "chat_template: it has no {% generation %} marks, so the text that an answer adds to "
                "the chat, after the generation prompt, is trained"
            )
        if not template.appends:
            notices.append(
                "chat_template: it may rewrite earlier turns; where it does, a row becomes several "
                "documents, each with the turns that are trained as the template writes them at their time"
            )
    if spec.type in _FRAMED and loaded.eos_id is None:
        notices.append(f"datasets: the tokenizer has no eos token, so {spec.type} texts end without one")
    return notices
