"""Prompts from the command line."""

from __future__ import annotations

import sys

from crosslayer.core.errors import ConfigError


def prompt_text(given: str) -> str:
    """Return the prompt, or standard input for `-`.

    Raises:
        ConfigError: for text that is not UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode() if given == "-" else given
        text.encode()
    except UnicodeError as error:
        raise ConfigError(
            "the prompt is not UTF-8 text"
            f" ({error.reason if isinstance(error, UnicodeDecodeError) else 'an invalid byte'}); convert it"
        ) from error
    return text
