"""Do plain transformers and PEFT compute what our model computes? Reloads the files and compares logits.

An adapter is loaded by PEFT onto transformers' own model, a merged checkpoint by transformers alone. Both are
held against our patched model.
"""

import math
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import NemotronHConfig

from nemo_ray.errors import CheckpointError, ConfigError
from nemo_ray.export.shards import read_shard
from nemo_ray.export.sides import Logits, Say, Setting, our_logits, plain_logits
from nemo_ray.host_memory import available_bytes
from nemo_ray.model import keys
from nemo_ray.model.adapter_reader import AdapterFiles
from nemo_ray.model.load import Checkpoint, read_model_config
from nemo_ray.model.prompt import read_tokenizer

# (difference of half of the tokens in standard deviations, mean KL in nats). Not the largest difference:
# where two experts' scores tie to the last bits, two right implementations pick different ones, which moves
# that token, and those after it, far. In bfloat16 that happens everywhere: there two right implementations
# of Nano 30B differ by a KL of 0.003, and one with a wrong step limit by 0.034.
LIMITS = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (math.inf, 0.01)}
_VISIBLE_KL = 1e-9  # less is rounding of the comparison itself
_NUM_PROMPTS, _PROMPT_TOKENS = 6, 160  # longer than a chunk of the scan
_CHAT = [
    {"role": "user", "content": "Which planets have rings?"},
    {"role": "assistant", "content": "Jupiter, Saturn, Uranus and Neptune."},
    {"role": "user", "content": "And which of them can be seen from Earth?"},
]
_GIB = 2**30


@dataclass(frozen=True)
class Difference:
    """Of two models' logits.

    Attributes:
        largest: over all tokens, in standard deviations of the logits.
        typical: the median over tokens of each token's largest, in the same unit.
        mean_kl: mean over tokens of the KL divergence, in nats.
    """

    largest: float
    typical: float
    mean_kl: float

    def __str__(self) -> str:
        return (
            f"max difference {self.largest:.2g} of the logits' std (half of the tokens below "
            f"{self.typical:.2g}), mean KL {self.mean_kl:.2g}"
        )


def difference(ours: Logits, theirs: Logits) -> Difference:
    """Compare logits (tokens, vocabulary) of several prompts; KL(ours || theirs)."""
    distances, divergences = [], []
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = mine.double(), other.double()
        distances.append((mine - other).abs().amax(-1) / mine.std())
        log_p, log_q = mine.log_softmax(-1), other.log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    distance, divergence = torch.cat(distances), torch.cat(divergences)
    return Difference(float(distance.max()), float(distance.median()), float(divergence.mean()))


def check_adapter(base: str, adapter: AdapterFiles, setting: Setting, say: Say) -> None:
    """The adapter in plain PEFT on plain transformers against ours.

    Raises: CheckpointError where they differ.
    """
    prompts = _prompts(_prepare(base, setting), [adapter.folder, Path(base)])
    ours = our_logits(base, adapter, None, prompts, setting)
    theirs = plain_logits(base, adapter, prompts, setting, say)
    name = f"the adapter in PEFT {version('peft')} on transformers {version('transformers')}"
    effect = difference(ours.apart, ours.without)
    _judge(name, difference(ours.apart, theirs), effect, setting, say)


def check_merged(base: str, adapter: AdapterFiles, merged: Path, setting: Setting, say: Say) -> None:
    """A merged checkpoint in plain transformers against ours, with the same rounding of the merged weights.

    How far that rounding moves the logits is said. Raises: CheckpointError where they differ.
    """
    prompts = _prompts(_prepare(base, setting), [merged])
    ours = our_logits(base, adapter, merged, prompts, setting)
    theirs = plain_logits(str(merged), None, prompts, setting, say)
    name = f"the merged model in transformers {version('transformers')}"
    effect = difference(ours.apart, ours.without)
    _judge(name, difference(ours.added, theirs), effect, setting, say)
    say(f"base and adapter apart differ from it by what merging rounds: {difference(ours.apart, theirs)}")


def check_model(folder: str, setting: Setting, say: Say) -> None:
    """A whole checkpoint in plain transformers against ours. Raises: CheckpointError where they differ."""
    prompts = _prompts(_prepare(folder, setting), [Path(folder)])
    ours = our_logits(folder, None, None, prompts, setting)
    theirs = plain_logits(folder, None, prompts, setting, say)
    name = f"the model in transformers {version('transformers')}"
    _judge(name, difference(ours.apart, theirs), None, setting, say)


def _judge(name: str, found: Difference, effect: Difference | None, setting: Setting, say: Say) -> None:
    """Say the figures, or raise CheckpointError.

    Args:
        effect: what the adapter itself changes; a check that cannot tell it from noise is no success.
    """
    typical, mean_kl = LIMITS[setting.dtype]
    bounds = f"limit of the KL {mean_kl:g}"
    if math.isfinite(typical):
        bounds = f"limits: half of the tokens {typical:g}, KL {mean_kl:g}"
    if not (found.typical <= typical and found.mean_kl <= mean_kl):
        raise CheckpointError(f"check: {name} differs from ours in {setting}: {found} ({bounds})")
    if effect is not None and found.mean_kl > max(_VISIBLE_KL, effect.mean_kl / 2):
        raise CheckpointError(
            f"check: {name} differs from ours in {setting} by a mean KL of {found.mean_kl:.2g}, and the "
            f"adapter itself makes {effect.mean_kl:.2g}: too coarse to tell; use --dtype float32"
        )
    say(f"checked {name}, {setting}: {found} ({bounds})")
    if effect is not None:
        say(f"the adapter itself moves the logits: {effect}")


# -- prompts and conditions -----------------------------------------------------------------------


def _prepare(folder: str, setting: Setting) -> NemotronHConfig:
    """Refuse what cannot work: a model that does not fit, kernels for a GPU where a CPU is to compute."""
    config = read_model_config(folder)
    if setting.device.type == "cpu" and find_spec("mamba_ssm") is not None:
        raise ConfigError(
            "--device: mamba-ssm is installed, and transformers calls its GPU kernels whatever the device; "
            "use --device cuda"
        )
    files = set(Checkpoint(folder).files.values())
    numbers = (
        math.prod(tensor.shape)
        for path in files
        for key, tensor in read_shard(path).tensors.items()
        if not keys.is_unused(key)
    )
    needed, free = sum(numbers) * setting.dtype.itemsize, _free_bytes(setting.device)
    if free is not None and needed > free:
        raise ConfigError(
            f"--check: {folder} takes {needed / _GIB:.1f} GiB in {setting}, and {free / _GIB:.1f} GiB are "
            "free; use --dtype bfloat16, another --device, or a larger machine"
        )
    return config


def _free_bytes(device: torch.device) -> int | None:
    """Memory that is free on the device; None where that cannot be told."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("--device: cuda is not available here; use --device cpu")
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()


def _prompts(config: NemotronHConfig, folders: list[Path]) -> list[torch.Tensor]:
    """Ids (tokens,) of some prompts: random ones, and a chat where a tokenizer with a template is there."""
    generator = torch.Generator().manual_seed(0)
    shape = (_NUM_PROMPTS, _PROMPT_TOKENS)
    prompts = list(torch.randint(0, config.vocab_size, shape, generator=generator))
    for folder in folders:
        if (folder / "tokenizer.json").exists():
            tokenizer = read_tokenizer(folder)
            if tokenizer.chat_template is not None:
                chat = tokenizer.apply_chat_template(_CHAT, add_generation_prompt=True, return_dict=False)
                prompts.append(torch.tensor(chat))
            break
    return prompts
