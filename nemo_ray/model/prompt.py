"""What `nemo-ray generate` is asked for: the folders of model and adapter, and the prompt as tokens."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ray.config.checks import is_hub_id, model_folder_errors
from nemo_ray.errors import CheckpointError, ConfigError
from nemo_ray.hub import is_reference, local_folder
from nemo_ray.run_dir import RunDir
from nemo_ray.stored_run import fetch_result
from nemo_ray.urls import is_url


@dataclass(frozen=True)
class Source:
    """What to load.

    Attributes:
        base: folder of a model, or its name on the hub, with "@" and a revision where it is no folder.
        adapter: folder of an adapter on it.
        named_by: the argument or file that names the base, for errors.
    """

    base: str
    adapter: Path | None
    named_by: str = "--model"


def find_source(model: str | None, adapter: str | None) -> Source:
    """Understand `--model` and `--adapter`; each may be the output_dir of a run.

    Raises: ConfigError where they do not say which model is meant.
    """
    if adapter is None:
        if model is None:
            raise ConfigError("--model: not given; name the folder of a model, or an adapter by --adapter")
        run = RunDir(model)
        if run.adapter_dir.is_dir():
            raise ConfigError(f"--model: {model} holds an adapter; give it as --adapter {model}")
        return Source(str(run.model_dir) if run.model_dir.is_dir() else model, None)
    run = RunDir(fetch_result(adapter, "--adapter") if is_url(adapter) else adapter)
    if not run.path.is_dir():
        raise ConfigError(
            f"--adapter: {adapter} is no folder; give that of an adapter, or a run's output_dir"
        )
    if run.model_dir.is_dir() and not run.adapter_dir.is_dir():
        if model is not None:
            raise ConfigError(
                f"--adapter: {adapter} holds a whole model, which needs no --model; leave it out"
            )
        return Source(str(run.model_dir), None)
    folder = run.adapter_dir if run.adapter_dir.is_dir() else run.path
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise ConfigError(
            f"--adapter: {folder} holds no adapter_config.json; an unfinished run has no adapter yet"
        )
    if model is not None:
        return Source(model, folder)
    config = _read_object(config_file)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"--model: not given, and {config_file} names no base_model_name_or_path")
    if is_hub_id(base) and isinstance(config.get("revision"), str):
        base = f"{base}@{config['revision']}"
    return Source(base, folder, named_by=str(config_file))


def base_folder(source: Source) -> Path:
    """The folder of the base model here; fetched first where it is a name on the hub.

    Raises: ConfigError where it is neither, or holds no Nemotron-H model; CheckpointError from the hub.
    """
    name = f"{source.base}@main" if is_hub_id(source.base) else source.base
    if not Path(name).is_dir() and not is_reference(name):
        raise ConfigError(
            f"{source.named_by}: {name} is no folder here; give --model FOLDER, or owner/name on the hub"
        )
    folder = local_folder(name, weights=True, say=lambda text: print(text, file=sys.stderr))
    for line in model_folder_errors(str(folder), source.base):
        raise ConfigError(line)
    return folder


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


def end_ids(folders: Sequence[Path], tokenizer: Any) -> frozenset[int]:
    """Tokens that end the text: of the first generation_config.json in `folders`, and the tokenizer's."""
    found = [tokenizer.eos_token_id]
    files = [folder / "generation_config.json" for folder in folders]
    for file in [file for file in files if file.is_file()][:1]:
        listed = _read_object(file).get("eos_token_id")
        found += listed if isinstance(listed, list) else [listed]
    return frozenset(token for token in found if isinstance(token, int))


def read_text(prompt: str | None) -> str:
    """The prompt, or standard input, less one newline at its end, where it is "-" or missing."""
    try:
        if prompt is None or prompt == "-":
            if sys.stdin is None:
                raise ConfigError("PROMPT: not given, and standard input is closed")
            if sys.stdin.isatty():
                print("the prompt, ended by Ctrl-D:", file=sys.stderr)
            prompt = sys.stdin.buffer.read().decode().removesuffix("\n")
        prompt.encode()  # Python lets other bytes of an argument through
    except UnicodeError as error:
        raise ConfigError(f"PROMPT: not UTF-8 text: {error}") from None
    if not prompt:
        raise ConfigError("PROMPT: empty; give a text, or pipe one to standard input")
    return prompt


def prompt_ids(tokenizer: Any, prompt: str, system: str | None, raw: bool) -> list[int]:
    """The prompt as tokens: as it stands, or as a user's message in the chat template.

    Raises: ConfigError where there is no template, or it refuses the messages.
    """
    if raw:
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ConfigError(
            "--model: its tokenizer has no chat template; give --raw to continue the plain text"
        )
    import jinja2

    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except jinja2.TemplateError as error:
        raise ConfigError(f"PROMPT: the chat template refuses it: {error}") from None


def read_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder, with transformers' code only. Raises: CheckpointError"""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"the tokenizer of {folder} cannot be read: {reason}") from None


def load_tokenizer(folders: Sequence[Path]) -> Any:
    """The tokenizer of the first of `folders` that has one: a run leaves its own beside the adapter."""
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
            try:
                return read_tokenizer(folder)
            except CheckpointError as error:
                raise ConfigError(f"--model: {error}") from None
    raise ConfigError(f"--model: {folders[-1]} holds no tokenizer.json")
