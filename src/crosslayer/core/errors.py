"""The errors that people see. Each message is one sentence that names the value and the remedy.

    CrosslayerError
    ├── ConfigError      a setting, or two that contradict each other
    ├── HostError        a language model that cannot be found, read or tapped
    ├── SourceError      text that cannot be found or read, or is empty
    ├── FormatError      a file or folder that is not what its format says
    ├── ResourceError    not enough memory or disk for what was asked
    ├── ConflictError    what was to be replaced has been changed by another
    ├── EndpointError    a language model's server that cannot be reached, or that refuses
    └── RunError         a run folder in use, or a resume that does not fit it

The command line prints the message and exits with 2. Invariants of our own are `assert`s, not these.
"""


class CrosslayerError(Exception):
    """Base of every error meant for people."""


class ConfigError(CrosslayerError):
    """A setting that cannot be, or two that contradict each other."""


class HostError(CrosslayerError):
    """A language model that cannot be found, read or tapped."""


class SourceError(CrosslayerError):
    """Text that cannot be found or read, or that is empty."""


class FormatError(CrosslayerError):
    """A file or folder that is not what its format says."""


class ResourceError(CrosslayerError):
    """Not enough memory or disk for what was asked."""


class ConflictError(CrosslayerError):
    """What was to be replaced has been changed by another in the meantime."""


class EndpointError(CrosslayerError):
    """A language model's server that cannot be reached, or that refuses."""


class RunError(CrosslayerError):
    """A run folder that is in use, or a resume that does not fit it."""
