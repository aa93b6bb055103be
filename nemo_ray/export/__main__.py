"""`python -m nemo_ray.export RUN_OR_ADAPTER`: merge an adapter, unfuse it, or check it in plain libraries."""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ray.config.command_line import CommandParser
from nemo_ray.errors import ConfigError, NemoRayError, tell
from nemo_ray.run_dir import RunDir
from nemo_ray.stored_run import fetch_result
from nemo_ray.urls import is_url

if TYPE_CHECKING:
    from nemo_ray.export.sides import Setting

EPILOG = """\
examples:
  python -m nemo_ray.export outputs/run --merge --output outputs/merged --check
  python -m nemo_ray.export outputs/run/adapter --merge --output merged --base-model ~/models/nano-30b
  python -m nemo_ray.export outputs/run --per-expert-keys --output outputs/adapter-for-vllm
  python -m nemo_ray.export outputs/run --check

exit codes: 0 done, 1 files are broken or do not fit, or the check failed, 2 an argument is wrong,
130 stopped by Ctrl-C. Where it fails, nothing is left at --output.
"""


def parser() -> CommandParser:
    """The command line of exporting."""
    result = CommandParser(
        prog="python -m nemo_ray.export",
        description="Turn a trained adapter into files that other programs load, and check them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("source", metavar="RUN_OR_ADAPTER", help="a run's output_dir, or an adapter's folder")
    result.add_argument("--merge", action="store_true", help="write a full checkpoint, in the base's layout")
    result.add_argument(
        "--per-expert-keys",
        action="store_true",
        help="write the adapter with a pair of factors for each expert; merged checkpoints are so anyway",
    )
    result.add_argument(
        "--check",
        action="store_true",
        help="compare logits with plain transformers and PEFT; with --merge, before anything appears",
    )
    result.add_argument(
        "--output", type=Path, metavar="DIR", help="folder to write, which must not exist yet"
    )
    result.add_argument(
        "--base-model", metavar="DIR", help="the base, where it is not where it was when it was trained on"
    )
    result.add_argument("--device", choices=("cpu", "cuda"), help="where --check computes (cpu)")
    result.add_argument("--dtype", choices=("float32", "bfloat16"), help="in what --check computes (float32)")
    return result


@dataclass(frozen=True)
class Source:
    """What is exported: an adapter on a base, or a whole model (adapter None, base its folder)."""

    base: str
    adapter: Path | None


def find_source(given: str, base_model: str | None) -> Source:
    """Understand RUN_OR_ADAPTER and --base-model.

    Raises: ConfigError where there is nothing to export, or no base to it.
    """
    run = RunDir(fetch_result(given, "RUN_OR_ADAPTER") if is_url(given) else given)
    if not run.path.is_dir():
        raise ConfigError(
            f"RUN_OR_ADAPTER: {given} is no folder; give a run's output_dir or an adapter's folder"
        )
    if (run.path / "adapter_config.json").is_file():
        folder = run.path
    elif run.adapter_dir.is_dir():
        folder = run.adapter_dir
    elif run.model_dir.is_dir():
        if base_model is not None:
            raise ConfigError(
                f"--base-model: {given} trained the whole model, which has no base; leave it out"
            )
        return Source(str(run.model_dir), None)
    else:
        reason = "its run has not ended yet" if run.holds_run() else "it is neither a run nor an adapter"
        raise ConfigError(f"RUN_OR_ADAPTER: {given} holds no adapter: {reason}")
    if base_model is not None:
        return Source(_local_base(base_model, "main", "--base-model"), folder)
    config_file = folder / "adapter_config.json"
    config = _read_object(config_file)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"--base-model: not given, and {config_file} names no base_model_name_or_path")
    return Source(_local_base(name, config.get("revision") or "main", str(config_file)), folder)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"adapter: {path} cannot be read: {error}") from None
    return value if isinstance(value, dict) else {}


def _local_base(name: str, revision: str, where: str) -> str:
    """The folder of a base that is given by folder or by its id on the hub."""
    from nemo_ray import hub

    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    reference = name if "@" in name else f"{name}@{revision}"
    if hub.is_reference(reference) and not folder.is_absolute():
        return str(hub.local_folder(reference, weights=True, say=_say))
    raise ConfigError(f"--base-model: {name} of {where} is no folder here; name the base by --base-model")


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parser().parse(arguments)
    try:
        _check_arguments(given)
        source = find_source(given.source, given.base_model)
        if source.adapter is None:
            _whole_model(given, source.base)
        elif given.merge:
            _merge(given, source.base, source.adapter)
        elif given.per_expert_keys:
            _per_expert(given, source.adapter)
        else:
            _quiet_libraries()
            from nemo_ray.export.check import check_adapter
            from nemo_ray.model.adapter_reader import read_adapter

            check_adapter(source.base, read_adapter(source.adapter), _setting(given), _say)
    except NemoRayError as error:
        return tell(error)
    except KeyboardInterrupt:
        return 130
    return 0


def _check_arguments(given: argparse.Namespace) -> None:
    writes = given.merge or given.per_expert_keys
    if not writes and not given.check:
        raise ConfigError("nothing to do: give --merge, --per-expert-keys or --check")
    if writes and given.output is None:
        raise ConfigError("--output: not given; name the folder to write")
    if given.output is not None and not writes:
        raise ConfigError("--output: --check alone writes nothing; leave it out, or give --merge too")
    for name in ("device", "dtype"):
        if getattr(given, name) is not None and not given.check:
            raise ConfigError(f"--{name}: only --check computes; give it too, or leave --{name} out")
    if given.check and given.per_expert_keys and not given.merge:
        raise ConfigError(
            "--check: PEFT cannot read per-expert keys of this model; check the adapter as it is, without "
            "--per-expert-keys"
        )


def _whole_model(given: argparse.Namespace, model: str) -> None:
    if given.merge or given.per_expert_keys:
        raise ConfigError(f"RUN_OR_ADAPTER: {model} is a whole model already, and there is nothing to merge")
    _quiet_libraries()
    from nemo_ray.export.check import check_model

    check_model(model, _setting(given), _say)


def _merge(given: argparse.Namespace, base: str, adapter_folder: Path) -> None:
    from nemo_ray.export.merge import mtp_note, plan_merge, write_merged
    from nemo_ray.export.output import leftovers, published, require_output
    from nemo_ray.model.adapter_reader import read_adapter

    if given.per_expert_keys:
        _say("note: a merged checkpoint has a key for each expert anyway, as its base has")
    adapter = read_adapter(adapter_folder)
    merge = plan_merge(base, adapter)
    require_output(given.output, merge.num_bytes)
    for path in leftovers(given.output):
        _say(f"note: {path} is left of an export that was killed; remove it unless one is running")
    with published(given.output) as folder:
        write_merged(merge, folder, _say)
        if merge.num_mtp_tensors:
            _say(f"note: {mtp_note(merge)}")
        if given.check:
            _quiet_libraries()
            from nemo_ray.export.check import check_merged

            check_merged(base, adapter, folder, _setting(given), _say)
    _say(f"merged {len(merge.changed)} tensors into {given.output}")


def _per_expert(given: argparse.Namespace, adapter_folder: Path) -> None:
    from nemo_ray.export.output import published, require_output
    from nemo_ray.export.per_expert import check_per_expert, num_bytes, write_per_expert
    from nemo_ray.model.adapter_reader import read_adapter

    adapter = read_adapter(adapter_folder)
    check_per_expert(adapter)
    require_output(given.output, num_bytes(adapter))
    with published(given.output) as folder:
        write_per_expert(adapter, folder)
    _say(f"wrote {given.output}: factors for each expert in {len(adapter.experts)} expert weights")


def _setting(given: argparse.Namespace) -> "Setting":
    import torch

    from nemo_ray.export.sides import Setting

    return Setting(torch.device(given.device or "cpu"), getattr(torch, given.dtype or "float32"))


def _quiet_libraries() -> None:
    """Leave out what transformers and PEFT say while they load: the figures are what is asked for."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


if __name__ == "__main__":
    sys.exit(main())
