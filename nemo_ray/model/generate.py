"""`nemo-ray generate` (python -m nemo_ray.model.generate): the model's answer to a prompt, as it comes.

Owns the command line and the text on standard output; folders and prompt are prompt.py's, tokens decode.py's.
torch is loaded only where tokens are computed, so that a mistake in the command line is answered at once.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nemo_ray.config.command_line import CommandParser
from nemo_ray.errors import ConfigError, NemoRayError, tell
from nemo_ray.model.prompt import base_folder, end_ids, find_source, load_tokenizer, prompt_ids, read_text

READER_LEFT = 128 + 13  # exit code: as a shell gives for SIGPIPE

EPILOG = """\
examples:
  nemo-ray generate --adapter outputs/quickstart "What does os.path.join do?"
  nemo-ray generate --model MODEL_FOLDER --temperature 0.7 --top-p 0.9 --seed 1 < prompt.txt

The text goes to standard output and ends its line there; figures go to standard error.
exit codes: 0 done, 1 the model cannot be loaded or run, 2 wrong arguments, 130 stopped by Ctrl-C
"""


class TextStream:
    """Token ids to text, piece by piece: never half a character, and the pieces add up to the whole text."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._given: list[int] = []  # ids of the piece before: some decoders look one token back
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character's bytes are not all there."""
        self._held.append(token)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._given, self._held = self._held, []
        return text

    def finish(self) -> str:
        """What is left: bytes that make no character are shown as U+FFFD."""
        return self._new_text()

    def _new_text(self) -> str:
        return self._decode(self._given + self._held)[len(self._decode(self._given)) :]


def parser() -> CommandParser:
    """The command line."""
    result = CommandParser(
        prog="nemo-ray generate",
        description="Let a Nemotron-H model, with or without an adapter, answer a prompt.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help='the text; "-" or none reads standard input')
    add("--model", metavar="FOLDER", help="the model; none: the one that the adapter names as its base")
    add("--adapter", metavar="FOLDER", help="a LoRA adapter in PEFT's files, or the output_dir of a run")
    add("--max-new-tokens", metavar="N", type=int, default=256, help="end after so many tokens (256)")
    add(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="0 (default): the likeliest token each time",
    )
    add(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens of this share (1)",
    )
    add("--seed", metavar="S", type=int, help="of the draws: the same text again on the same device")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU where there is one")
    add("--load-in-4bit", action="store_true", help="hold the weights in 4 bits (NF4), as in QLoRA")
    add("--system", metavar="TEXT", help="the system message")
    add("--raw", action="store_true", help="continue the plain text, without the chat template")
    return result


def check_arguments(given: argparse.Namespace) -> None:
    """Raises: ConfigError for a value out of its range, or two arguments that contradict each other."""
    rules = (
        (given.max_new_tokens >= 1, f"--max-new-tokens: {given.max_new_tokens} is below 1"),
        (0 <= given.temperature < float("inf"), f"--temperature: {given.temperature} is not 0 or above"),
        (0 < given.top_p <= 1, f"--top-p: {given.top_p} is not above 0 and at most 1"),
        (
            given.top_p == 1 or given.temperature > 0,
            "--top-p: nothing is drawn at temperature 0; give a --temperature too",
        ),
        (given.seed is None or 0 <= given.seed < 2**63, f"--seed: {given.seed} is not from 0 to 2**63 - 1"),
        (
            not (given.raw and given.system is not None),
            "--system: a plain text (--raw) has no system message",
        ),
    )
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def run(given: argparse.Namespace) -> int:
    """Load, answer, print; returns the exit code."""
    source = find_source(given.model, given.adapter)
    base = base_folder(source)
    text = read_text(given.prompt)
    import torch

    from nemo_ray.model.decode import Sampling, generate_tokens
    from nemo_ray.model.inference import load_for_inference
    from nemo_ray.model.load import Precision
    from nemo_ray.model.ssd import missing_kernels

    if given.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: cuda is not available here; use --device cpu")
    cuda = given.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    folders = [folder for folder in (source.adapter, base) if folder is not None]
    tokenizer = load_tokenizer(folders)
    ids = prompt_ids(tokenizer, text, given.system, given.raw)
    try:
        dtype = torch.bfloat16 if cuda else torch.float32
        precision = Precision(dtype, dtype, linears_4bit=given.load_in_4bit, experts_4bit=given.load_in_4bit)
        model = load_for_inference(str(base), source.adapter, precision, device)
        if (missing := missing_kernels(device)) is not None:
            print(f"note: {missing}", file=sys.stderr)
        if not ids or max(ids) >= model.config.vocab_size:
            raise ConfigError(
                f"PROMPT: its {len(ids)} tokens are none, or beyond the model's {model.config.vocab_size}: "
                f"is the tokenizer of {folders[0]} the model's?"
            )
        generator = torch.Generator(device)
        seed = generator.seed() if given.seed is None else given.seed
        generator.manual_seed(seed)
        tokens = generate_tokens(
            model,
            ids,
            given.max_new_tokens,
            end_ids(folders, tokenizer),
            Sampling(given.temperature, given.top_p),
            generator,
        )
        drawn = f"; drawn with --seed {seed}" if given.temperature > 0 else ""
        return print_tokens(tokens, tokenizer, len(ids), given.max_new_tokens, drawn)
    except torch.OutOfMemoryError:
        raise NemoRayError(
            "the GPU's memory is too small for this model and text; try --device cpu"
        ) from None


def print_tokens(
    tokens: Iterator[int], tokenizer: Any, num_prompt: int, max_new_tokens: int, drawn: str
) -> int:
    """Write the text as it comes, then the figures to standard error; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # also where the locale knows no UTF-8
    stream = TextStream(
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
    started, first, count, code, last = time.monotonic(), 0.0, 0, 0, ""
    try:
        for token in tokens:
            count += 1
            first = first or time.monotonic()
            text = stream.add(token)
            last = text or last
            write(text)
    except KeyboardInterrupt:
        code = 130
    ended = time.monotonic()
    text = stream.finish()
    write(text if (text or last).endswith("\n") else text + "\n")
    rate = f", then {(count - 1) / (ended - first):.1f} tokens/s" if count > 1 else ""
    end = "; stopped by Ctrl-C" if code else "; cut at --max-new-tokens" if count == max_new_tokens else ""
    print(
        f"{num_prompt} tokens read, {count} written: {(first or ended) - started:.2f} s to the first"
        f"{rate}{end}{drawn}",
        file=sys.stderr,
    )
    return code


def write(text: str) -> None:
    """To standard output, at once."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parser().parse(arguments)
    try:
        check_arguments(given)
        return run(given)
    except NemoRayError as error:
        return tell(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # Python would try once more to write what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_LEFT


if __name__ == "__main__":
    sys.exit(main())
