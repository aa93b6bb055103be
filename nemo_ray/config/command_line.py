"""The parser of every command. Wrong arguments are answered like any other mistake: `error:`, in one line."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from nemo_ray.config.overrides import without_dashes
from nemo_ray.config.translate import show
from nemo_ray.errors import ConfigError, tell


class CommandParser(argparse.ArgumentParser):
    """argparse's, with this package's words for what it refuses."""

    _takes_overrides = False

    def add_overrides(self, text: str = "replaces a key of the file") -> None:
        """Let `key=value` follow the configuration; `text` is its help."""
        self._takes_overrides = True
        # Without a default argparse calls them required, where something else is missing.
        self.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=text)

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Options may stand anywhere. Raises: SystemExit with 2 where the arguments are wrong."""
        given, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            # After an unknown option argparse calls overrides unknown too.
            options = [word for word in unknown if word.startswith("-")]
            self._refuse("\n".join(map(self._unknown, options or unknown)))
        return given

    def error(self, message: str) -> NoReturn:
        """Called by argparse for what it refuses itself."""
        problem = " ".join(message.split()).removeprefix("argument ")
        self._refuse(f"{problem}; `{self.prog} --help` says more")

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"{show(word)}: one argument too many; `{self.prog} --help` says more"
        if not self._takes_overrides:
            return f"{show(word)}: no such option; `{self.prog} --help` lists them"
        if "=" in word:
            return without_dashes(word)
        return f"{show(word)}: no such option; `{self.prog} --help` lists them, and keys are key=value"

    def _refuse(self, lines: str) -> NoReturn:
        raise SystemExit(tell(ConfigError(lines)))
