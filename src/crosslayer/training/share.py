"""The plan of one rank of a distributed run."""

from __future__ import annotations

from dataclasses import replace

from crosslayer.training.config import TrainConfig
from crosslayer.training.plan import HostShape, Plan, make_plan


def plan_of_one_rank(config: TrainConfig, shape: HostShape, data_ranks: int = 1) -> Plan:
    """Return the plan of one rank; disk space is that of the whole run.

    Args:
        data_ranks: number of data-parallel groups of `config.feature_ranks` ranks.

    Raises:
        ConfigError: for a batch that cannot be divided evenly over the ranks.
    """
    whole, rank = make_plan(config, shape), make_plan(config.share(data_ranks), shape)
    return replace(
        rank,
        n_parameters=whole.n_parameters,
        disk_bytes=whole.disk_bytes,
        # Feature ranks share the host's forward passes of their group.
        host_flops=whole.host_flops / config.feature_ranks,
        tokens=config.tokens // data_ranks,
    )
