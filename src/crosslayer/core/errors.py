"""Errors for users. Each message is one sentence with the wrong value and the remedy.

    CrosslayerError
    ├── ConfigError      an invalid setting, or two that contradict each other
    ├── HostError        a language model that cannot be found, read or hooked
    ├── SourceError      text that cannot be found or read, or is empty
    ├── FormatError      a file or folder that does not match its format
    ├── ResourceError    not enough memory or disk
    ├── ConflictError    a value that was changed elsewhere before it was replaced
    ├── EndpointError    an LLM endpoint that cannot be reached, or that refuses requests
    └── RunError         a run folder in use, or one that cannot be resumed this way

The command line prints the message and exits with 2. Internal invariants are `assert`s.
"""


class CrosslayerError(Exception):
    """Base class of errors for users."""


class ConfigError(CrosslayerError):
    """An invalid setting, or two that contradict each other."""


class HostError(CrosslayerError):
    """A language model that cannot be found, read or hooked."""


class SourceError(CrosslayerError):
    """Text that cannot be found or read, or that is empty."""


class FormatError(CrosslayerError):
    """A file or folder that does not match its format."""


class ResourceError(CrosslayerError):
    """Not enough memory or disk."""


class ConflictError(CrosslayerError):
    """A value that was changed elsewhere before it was replaced."""


class EndpointError(CrosslayerError):
    """An LLM endpoint that cannot be reached, or that refuses requests."""


class RunError(CrosslayerError):
    """A run folder that is in use, or that cannot be resumed with these settings."""
