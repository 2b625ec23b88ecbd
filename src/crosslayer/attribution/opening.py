"""Open a host and its transcoder, given by name, folder or object."""

from __future__ import annotations

from typing import Any

import torch

from crosslayer.clt.config import Provenance
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.open import load_clt
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError
from crosslayer.eval.evaluate import check_shape
from crosslayer.eval.replacement_model import ReplacementModel, host_of
from crosslayer.host.host import Host, choose_device


def open_both(model: Any, clt: Any, device: str) -> tuple[Host, Opened]:
    """Open a host and its transcoder, given by name, folder or object."""
    if isinstance(model, ReplacementModel):
        if clt is not None:
            raise ConfigError("the model already holds a transcoder; omit clt, or give the host alone")
        return model.host, Opened(model.clt, model.provenance)
    if clt is None:
        raise ConfigError("no transcoder was given; give clt, or a ReplacementModel")
    if isinstance(model, Host):
        where = str(model.device)
    else:
        where = str(clt.clt.device) if isinstance(clt, Opened) else choose_device(device)
    if isinstance(clt, CLT):
        if not isinstance(model, Host):
            raise ConfigError("a bare CLT has no hook names; give a loaded host with it, or give both by name")
        check_shape(model, clt)
        provenance = Provenance(
            model_name=model.name,
            input_hook=model.input_hook,
            output_hook=model.output_hook,
            policy=model.policy,
            scan="",
        )
        return model, Opened(clt, provenance)
    opened = clt if isinstance(clt, Opened) else load_clt(clt, device=where)
    if opened.clt.device.type != torch.device(where).type:
        raise ConfigError(
            f"the host is on {where}, the transcoder on {opened.clt.device}; load both on the same device"
        )
    return host_of(opened, model, device=where), opened
