"""Groups of ranks, and the mesh of two kinds of them.

    feature ranks -->    Ranks of a row share the features: each holds F/N of every layer, and all see the row's tokens.
    0  1  2  3           Ranks of a column share the tokens: each holds the same features, and sees other tokens.
    4  5  6  7           A row's numbers follow one another, so that it lies within a node that has room for it.

A group of one does nothing, and does it without a process group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from crosslayer.core.errors import ConfigError, CrosslayerError, RunError

T = TypeVar("T")
TOGETHER = 1 << 20
"""Numbers up to which a tensor costs more to send alone than to copy beside others."""


class LostRank(RunError):
    """Another rank ended while this one waited for it."""


class Group:
    """Some of the ranks, as one of them sees it."""

    def __init__(self, handle: dist.ProcessGroup | None = None) -> None:
        self.handle = handle
        self.rank: int = dist.get_rank(handle) if handle else 0
        self.size: int = dist.get_world_size(handle) if handle else 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.size > 1:
            with _talking():
                dist.all_reduce(tensor, group=self.handle)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of each rank's tensor, whose gradient is, on every rank, that of the sum.

        What follows the sum is computed alike by every rank, so its gradient is there already: adding those of all
        ranks would multiply it by their number.
        """
        return _Sum.apply(tensor, self) if self.size > 1 else tensor  # type: ignore[return-value]

    def total(self, number: float) -> float:
        """The sum of each rank's number."""
        return self.sum_(torch.tensor(number, dtype=torch.float64)).item() if self.size > 1 else number

    def least(self, number: float) -> float:
        """The smallest of the ranks' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64)
        with _talking():
            dist.all_reduce(value, dist.ReduceOp.MIN, group=self.handle)
        return value.item()

    def any_(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.total(flag) > 0

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape, in order of rank."""
        if self.size == 1:
            return [tensor]
        # As bytes, which every backend knows.
        mine = tensor.contiguous().view(-1).view(torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with _talking():
            dist.all_gather(parts, mine, group=self.handle)
        return [part.view(tensor.dtype).view(tensor.shape) for part in parts]

    def cat(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Every rank's tensor, all of one shape, one after another along an axis."""
        return torch.cat(self.gather(tensor), dim=dim) if self.size > 1 else tensor

    def objects(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with _talking():
                dist.all_gather_object(values, value, group=self.handle)
        return values

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks; small ones travel together."""
        if self.size == 1:
            return
        small: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() > TOGETHER:
                self.sum_(tensor).div_(self.size)
            else:
                small.setdefault(tensor.dtype, []).append(tensor)
        for some in small.values():
            flat = self.sum_(torch.cat([tensor.flatten() for tensor in some])).div_(self.size)
            for tensor, mean in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def copy_from_first(self, parameters: Iterable[Tensor]) -> None:
        """Overwrite these tensors by the first rank's."""
        if self.size > 1:
            for p in parameters:
                with _talking():
                    dist.broadcast(p.data, group=self.handle, group_src=0)

    def by_first(self, action: Callable[[], T]) -> T | None:
        """What an action gives on the first rank, and nothing on the others; an error meant for people is raised on
        all.
        """
        result = failure = None
        if self.rank == 0:
            try:
                result = action()
            except CrosslayerError as error:
                failure = error
        if (failure := self.objects(failure)[0]) is not None:
            raise failure
        return result

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.total(0)


class Mesh:
    """All ranks, those that share this rank's features, and those that share its tokens."""

    def __init__(
        self,
        world: Group | None = None,
        data: Group | None = None,
        features: Group | None = None,
        devices: DeviceMesh | None = None,
    ) -> None:
        self.world, self.data, self.features = world or Group(), data or Group(), features or Group()
        self.devices = devices

    @property
    def shape(self) -> tuple[int, int]:
        """Data ranks and feature ranks."""
        return self.data.size, self.features.size

    def __deepcopy__(self, memo: dict[int, Any]) -> Mesh:
        # It belongs to the process, not to what is copied.
        return self


ALONE = Mesh()


def lay_out(feature_ranks: int, device_type: str = "cpu") -> Mesh:
    """Arrange all ranks as a mesh whose rows have `feature_ranks`.

    Raises:
        ConfigError: where they do not divide the ranks.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks % feature_ranks:
        some = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise ConfigError(
            f"feature_ranks={feature_ranks} does not divide the number of ranks, {ranks}; give --feature-ranks one of"
            f" {some}, or start another number of ranks"
        )
    if ranks == 1:
        return ALONE
    devices = init_device_mesh(
        device_type, (ranks // feature_ranks, feature_ranks), mesh_dim_names=("data", "features")
    )
    data, features = (Group(devices.get_group(name)) for name in ("data", "features"))
    return Mesh(Group(dist.group.WORLD), data, features, devices)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        return group.sum_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@contextmanager
def _talking() -> Iterator[None]:
    """What a backend says when the other end is gone becomes an error for people."""
    try:
        yield
    except RuntimeError as error:
        first_line = re.sub(
            r"^\[[^]]*\] *", "", str(error).strip().splitlines()[0]
        )  # less the place in the backend's source
        raise LostRank(
            f"rank {dist.get_rank()} waited for another, which ended or cannot be reached ({first_line}): see what that"
            " one said, if it could"
        ) from error
