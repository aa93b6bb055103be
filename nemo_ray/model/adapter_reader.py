"""Reading a PEFT adapter's folder in our names and shapes, one target at a time.

Owns the way from adapter_config.json and adapter_model.safetensors to factors; what is done with them (merged
into a base, put into a model to train on) is the callers' business. Nothing but the header is read before a
factor is asked for.

Shapes: E experts, R rank, I inputs, O outputs.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_ray.errors import CheckpointError, ConfigError
from nemo_ray.model import keys
from nemo_ray.peft_config import CONFIG_NAME, TENSORS_NAME, read_adapter_config

# PEFT saves these where the vocabulary was resized, without naming them in modules_to_save.
_EMBEDDINGS = ("model.embeddings.weight", "lm_head.weight")


@dataclass(frozen=True)
class LoraFactors:
    """What a target adds to its weight: scaling * B @ A, float32 or as stored.

    Attributes:
        shape: of the weight it belongs to: (O, I) of a linear layer, (E, O, I) of an expert bank.
        A, B: (R, I) and (O, R); of a bank (E, R, I) and (E, O, R). Read from the file at each access.
    """

    shape: tuple[int, ...]
    rank: int
    scaling: float
    _read: Callable[[str], torch.Tensor] = field(repr=False, compare=False)

    @property
    def A(self) -> torch.Tensor:  # noqa: N802
        stored = self._read("lora_A")
        return stored.unflatten(0, (self.shape[0], self.rank)) if len(self.shape) == 3 else stored

    @property
    def B(self) -> torch.Tensor:  # noqa: N802
        stored = self._read("lora_B")
        if len(self.shape) == 2:
            return stored
        return stored.unflatten(1, (self.rank, self.shape[0])).permute(2, 0, 1)


class SavedModules(Mapping[str, torch.Tensor]):
    """Tensors of modules that were trained whole, by name (`lm_head.weight`); read when asked for."""

    def __init__(self, stored: dict[str, str], file: "_TensorFile") -> None:
        self._stored, self._file = stored, file

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.read(self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        return self._file.shapes[self._stored[name]]


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's folder.

    Attributes:
        config: adapter_config.json as it is.
        linear: factors by module path (`model.layers.2.mixer.q_proj`), by number of the layer.
        experts: factors by parameter path (`model.layers.1.mixer.experts.up_proj`).
        modules_to_save: tensors by parameter path (`lm_head.weight`).
    """

    folder: Path
    config: dict[str, Any]
    linear: dict[str, LoraFactors]
    experts: dict[str, LoraFactors]
    modules_to_save: SavedModules


class _TensorFile:
    """One safetensors file, opened anew for each read: mapped pages would count as this process's memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    def _open(self) -> safe_open:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"adapter: {self.path} cannot be read: {error}") from None

    def read(self, key: str) -> torch.Tensor:
        with self._open() as file:
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor.clone()


def read_adapter(folder: str | Path) -> AdapterFiles:
    """Read the names and shapes of an adapter as PEFT saves it.

    Raises: ConfigError where the folder is no LoRA adapter or one of a kind that is not read here;
        CheckpointError where its file is broken, incomplete, or does not fit its configuration.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or config[key] <= 0:
            raise ConfigError(
                f"adapter: {folder / CONFIG_NAME} has {key} {config.get(key)!r}, not a positive number"
            )
    path = folder / TENSORS_NAME
    if not path.exists():
        raise ConfigError(f"adapter: {path} does not exist (other formats than safetensors are not read)")
    file = _TensorFile(path)
    pairs, saved = _sort_keys(file, config)
    linear: dict[str, LoraFactors] = {}
    experts: dict[str, LoraFactors] = {}
    for module, pair in pairs.items():
        missing = {"lora_A", "lora_B"} - pair.keys()
        if missing:
            raise CheckpointError(f"adapter: {path} lacks {missing.pop()} of {module}")
        target, is_bank = _target_of(module, pairs, config, path)
        factors = _factors(target, is_bank, pair, config, file)
        (experts if is_bank else linear)[target] = factors
    return AdapterFiles(
        folder,
        config,
        dict(sorted(linear.items(), key=_by_number)),
        dict(sorted(experts.items(), key=_by_number)),
        SavedModules(saved, file),
    )


def _by_number(item: tuple[str, LoraFactors]) -> list[tuple[bool, int, str]]:
    """Numbers as numbers: layer 2 before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in item[0].split(".")]


def _sort_keys(file: _TensorFile, config: dict[str, Any]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """({module as PEFT nests it: {"lora_A" | "lora_B": key}}, {parameter that was saved whole: key})."""
    pairs: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    wanted = tuple(config.get("modules_to_save") or ())
    for key in file.shapes:
        name, factor = keys.from_peft(key)
        if factor is not None:
            pairs.setdefault(name, {})[factor] = key
        elif name in _EMBEDDINGS or _names(wanted, name.rpartition(".")[0]):
            saved[name] = key
        else:
            raise CheckpointError(
                f"adapter: {file.path} holds {key}, which is neither a factor lora_A or lora_B of a linear "
                "layer or expert bank nor named by modules_to_save"
            )
    return pairs, saved


def _names(targets: tuple[str, ...], path: str) -> bool:
    """PEFT's rule for lists: a whole path, or the end of one after a dot."""
    return any(path == target or path.endswith("." + target) for target in targets)


def _target_of(
    module: str, pairs: Mapping[str, object], config: dict[str, Any], path: Path
) -> tuple[str, bool]:
    """(our path, whether it is an expert bank) of a module as PEFT nests it.

    PEFT wraps a bank's projections in the order of the module: where both have factors, up lies inside
    (`experts.base_layer`); a single one is known by target_parameters only.
    """
    inner = module.removesuffix(".base_layer")
    if not inner.endswith(".experts"):
        return module, False
    if f"{inner}.base_layer" in pairs:
        if inner not in pairs:
            raise CheckpointError(f"adapter: {path} has factors of {module} and none of {inner}")
        return f"{inner}.{'up' if module != inner else 'down'}_proj", True
    targets = tuple(config.get("target_parameters") or ())
    sides = [side for side in ("up_proj", "down_proj") if _names(targets, f"{inner}.{side}")]
    if len(sides) != 1:
        raise CheckpointError(
            f"adapter: {path} has one pair of factors for {inner}, and target_parameters of {CONFIG_NAME} "
            f"names {' and '.join(sides) or 'none'} of its projections"
        )
    return f"{inner}.{sides[0]}", True


def _by_pattern(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    """PEFT's rule for rank_pattern and alpha_pattern: the first that matches the end of the path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _factors(
    target: str, is_bank: bool, pair: dict[str, str], config: dict[str, Any], file: _TensorFile
) -> LoraFactors:
    rank = int(_by_pattern(config.get("rank_pattern"), target, config["r"]))
    alpha = _by_pattern(config.get("alpha_pattern"), target, config["lora_alpha"])
    A, B = file.shapes[pair["lora_A"]], file.shapes[pair["lora_B"]]
    fits = len(A) == len(B) == 2 and A[0] == B[1]
    if not fits or (A[0] % rank if is_bank else A[0] != rank):
        raise CheckpointError(
            f"adapter: {file.path}: lora_A {A} and lora_B {B} of {target} do not fit rank {rank} of "
            f"{CONFIG_NAME}"
        )
    shape = (A[0] // rank, B[0], A[1]) if is_bank else (B[0], A[1])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraFactors(shape, rank, scaling, lambda factor: file.read(pair[factor]))
