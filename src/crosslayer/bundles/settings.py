"""Settings of the pass over text: number and width of examples, resolution of histograms. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from crosslayer.core.errors import ConfigError

LOG_BINS = 32
LOG_FIRST_EXPONENT = -8
"""Two bins per octave, [2^e, 1.5 2^e) and [1.5 2^e, 2^(e+1)), from 2^-8 to 2^8; the last bin takes larger values."""
LINEAR_BINS = 32
"""The linear histogram divides [0, 2^e) evenly; 2^e is the smallest power of two above the max activation."""


def log_edges() -> list[float]:
    """Return the lower edges of the log histogram's bins, and the upper edge of the last."""
    return [2.0 ** (LOG_FIRST_EXPONENT + i // 2) * (1.5 if i % 2 else 1.0) for i in range(LOG_BINS + 1)]


@dataclass(frozen=True, kw_only=True)
class ScanSettings:
    """Limits of what is stored per feature.

    Attributes:
        n_top: number of top-activation examples, max one per row of text.
        n_quantiles, per_quantile: number of activation bins with equally many rows, and of examples from each bin.
        n_reservoir: rows sampled uniformly, by hash, from all rows on which the feature fires. Quantiles and token
            counts are computed on them.
        window, before: tokens per example, and how many of them precede the peak where the row allows it.
        sample_entries: active (token, feature) pairs of the token sample for co-activation and rules.
        n_logits, n_neighbours, n_coactive, n_virtual: lengths of the lists per feature (`n_coactive` each for the
            feature's own layer and for other layers).
    """

    n_top: int = 16
    n_quantiles: int = 4
    per_quantile: int = 4
    n_reservoir: int = 48
    window: int = 64
    before: int = 40
    sample_entries: int = 1 << 25
    n_logits: int = 20
    n_neighbours: int = 10
    n_coactive: int = 8
    n_virtual: int = 10

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < (0 if name == "before" else 1):
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.window > 255:
            raise ConfigError(f"window={self.window} exceeds 255, the longest example a bundle can hold; lower it")
        for name, most in (("n_quantiles", 255), ("n_reservoir", 65_535)):
            if getattr(self, name) > most:
                raise ConfigError(
                    f"{name}={getattr(self, name)} exceeds {most}, the maximum of the bundle format; lower it"
                )
        if self.before >= self.window:
            raise ConfigError(f"before={self.before} must be less than window={self.window}; lower it")
        if self.n_reservoir < self.n_quantiles * self.per_quantile:
            raise ConfigError(f"n_reservoir={self.n_reservoir} is less than n_quantiles * per_quantile; raise it")

    @property
    def n_examples(self) -> int:
        """Max number of examples per feature."""
        return self.n_top + self.n_quantiles * self.per_quantile
