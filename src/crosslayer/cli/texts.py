"""Texts from the command line."""

from __future__ import annotations

import sys

from crosslayer.core.errors import ConfigError


def prompt_text(given: str) -> str:
    """A prompt as it was given, or standard input for `-`.

    Raises:
        ConfigError: for what is not UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode() if given == "-" else given
        text.encode()
    except UnicodeError as error:
        raise ConfigError(
            "the prompt is not UTF-8 text"
            f" ({error.reason if isinstance(error, UnicodeDecodeError) else 'a byte that is no letter'}); convert it"
        ) from error
    return text
