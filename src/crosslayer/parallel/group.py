"""Groups of ranks, and the mesh of data ranks x feature ranks.

    feature ranks -->    A row shards the features: each rank holds F/N of every layer, and all see the row's tokens.
    0  1  2  3           A column is data parallel: each rank holds the same features, and sees other tokens.
    4  5  6  7           Ranks of a row are consecutive, so that a row fits in one node if possible.

In a group of one rank, every operation is a no-op and needs no process group.
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
"""Tensors up to this size are concatenated before an all-reduce."""


class LostRank(RunError):
    """Another rank ended while this rank waited for it."""


class Group:
    """A group of ranks, as seen by one of them."""

    def __init__(self, handle: dist.ProcessGroup | None = None) -> None:
        self.handle = handle
        self.rank: int = dist.get_rank(handle) if handle else 0
        self.size: int = dist.get_world_size(handle) if handle else 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.size > 1:
            with _collective():
                dist.all_reduce(tensor, group=self.handle)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks; its gradient on every rank is the gradient of the sum.

        Every rank computes the same function of the sum, so the gradient is not summed over ranks again.
        """
        return _Sum.apply(tensor, self) if self.size > 1 else tensor  # type: ignore[return-value]

    def total(self, number: float) -> float:
        """Return the sum of a number over ranks."""
        return self.sum_(torch.tensor(number, dtype=torch.float64)).item() if self.size > 1 else number

    def least(self, number: float) -> float:
        """Return the minimum of a number over ranks."""
        if self.size == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64)
        with _collective():
            dist.all_reduce(value, dist.ReduceOp.MIN, group=self.handle)
        return value.item()

    def any_(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.total(flag) > 0

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return every rank's tensor, in order of rank; all have one shape."""
        if self.size == 1:
            return [tensor]
        # As bytes, which every backend supports.
        mine = tensor.contiguous().view(-1).view(torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with _collective():
            dist.all_gather(parts, mine, group=self.handle)
        return [part.view(tensor.dtype).view(tensor.shape) for part in parts]

    def cat(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Concatenate every rank's tensor along an axis; all have one shape."""
        return torch.cat(self.gather(tensor), dim=dim) if self.size > 1 else tensor

    def objects(self, value: Any) -> list[Any]:
        """Return every rank's value, in order of rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with _collective():
                dist.all_gather_object(values, value, group=self.handle)
        return values

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over ranks; small tensors are reduced together."""
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
        """Overwrite these tensors with those of rank 0."""
        if self.size > 1:
            for p in parameters:
                with _collective():
                    dist.broadcast(p.data, group=self.handle, group_src=0)

    def by_first(self, action: Callable[[], T]) -> T | None:
        """Run `action` on rank 0 and return its result there, None elsewhere; raise its errors on all ranks."""
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
        """Wait for all ranks."""
        self.total(0)


class Mesh:
    """The groups of this rank: all ranks, its data ranks and its feature ranks."""

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
        # A mesh belongs to the process, and is not copied.
        return self


ALONE = Mesh()


def lay_out(feature_ranks: int, device_type: str = "cpu") -> Mesh:
    """Arrange all ranks as a mesh with rows of `feature_ranks` ranks.

    Raises:
        ConfigError: if `feature_ranks` does not divide the number of ranks.
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
def _collective() -> Iterator[None]:
    """Raise LostRank when a collective fails because another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        first_line = re.sub(
            r"^\[[^]]*\] *", "", str(error).strip().splitlines()[0]
        )  # without the source location of the backend
        raise LostRank(
            f"rank {dist.get_rank()} lost another rank, which ended or cannot be reached ({first_line}): see the"
            " output of the other rank"
        ) from error
