"""The plan of one rank of many: what it holds, and what it computes."""

from __future__ import annotations

from dataclasses import replace

from crosslayer.training.config import TrainConfig
from crosslayer.training.plan import HostShape, Plan, make_plan


def plan_of_one_rank(config: TrainConfig, shape: HostShape, data_ranks: int = 1) -> Plan:
    """The plan of a rank among `data_ranks` groups of `config.feature_ranks`; the disk is all of theirs.

    Raises:
        ConfigError: for a batch that the ranks cannot share evenly.
    """
    whole, mine = make_plan(config, shape), make_plan(config.share(data_ranks), shape)
    return replace(
        mine,
        n_parameters=whole.n_parameters,
        disk_bytes=whole.disk_bytes,
        # Of its group's tokens it puts its own part through the host.
        host_flops=whole.host_flops / config.feature_ranks,
        tokens=config.tokens // data_ranks,
    )
