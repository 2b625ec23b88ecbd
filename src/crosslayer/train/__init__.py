"""Training: config, losses, the loop, checkpoints, plan, recipes.

May import `eval`, `acts`, `host`, `clt`, `dist`, `records` and `core`. The package can be called: `xl.train(config, out)` is
`crosslayer.train.loop.train`, whichever of its modules was imported first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from crosslayer.train.loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
