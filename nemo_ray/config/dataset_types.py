"""Which keys of a dataset's entry each `type` reads, beside those that say which rows it has.

A type's record in nemo_ray/data/formats takes its keys from here; the checks tell of keys that do nothing.
"""

TYPE_KEYS: dict[str, tuple[str, ...]] = {
    "chat_template": (
        *("field_messages", "message_property_mappings", "roles", "field_tools", "field_system"),
        *("drop_system_message", "roles_to_train", "train_on_eos", "train_on_eot", "message_field_training"),
        *("message_field_training_detail", "chat_template", "chat_template_kwargs"),
    ),
    "prompt_completion": (
        *("field_prompt", "field_completion", "message_property_mappings", "roles", "field_tools"),
        *("chat_template", "chat_template_kwargs", "train_on_eos", "train_on_eot"),
    ),
    "alpaca": (
        *("field_instruction", "field_input", "field_output", "field_system", "system_prompt"),
        *("system_format", "format", "no_input_format"),
    ),
    "input_output": ("field_segments",),
    "completion": ("field",),
    "pretrain": ("field",),
    "tokenized": (),
}

CHAT_TYPES = ("chat_template", "prompt_completion")
"""Types whose rows may be rendered by the chat template."""
