"""timm's own weights of a model: from its cache, or downloaded, or a word on why they are not."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from ...model import head_names
from .weight_file import first_line

_PATIENCE_SECONDS = 5.0  # for a host to answer, which takes a fraction of one
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which timm looks


def load_pretrained(
    model: nn.Module, name: str, create: Callable[[dict[str, Any]], nn.Module]
) -> bool:
    """Copy timm's own weights into `model`, and say whether the head was left as it is.

    Args:
        model: without weights.
        name: of its architecture.
        create: build it with these arguments of `timm.create_model` beside its own.

    Raises:
        ValueError: there are none, or they can neither be found in the cache nor downloaded.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    more: dict[str, Any] = {"pretrained": True}
    address = _address(config)
    if address is not None and not _answers(address):
        cached = _cached(config, address)
        if cached is None:
            raise ValueError(
                f"pretrained: {urlparse(address).hostname} does not answer and the weights of "
                f"{name} are not in the cache; download {address} where there is a network, and "
                "name that file as the weights (-w)"
            )
        if config.get("hf_hub_id"):  # the hub asks its server even for what it has
            more["pretrained_cfg_overlay"] = {"file": cached}
    try:
        twin = create(more)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"pretrained: the weights of {name} cannot be had: {first_line(error)} "
            "(a file with them can be named as the weights, -w)"
        ) from error
    own_classes = (getattr(twin, "pretrained_cfg", None) or {}).get("num_classes")
    keeps_head = own_classes == getattr(model, "num_classes", None)
    left_out = set() if keeps_head else set(head_names(twin))
    state = {name: t for name, t in twin.state_dict().items() if name not in left_out}
    model.load_state_dict(state, strict=False)
    return not keeps_head


def _address(config: Mapping[str, Any]) -> str | None:
    """Where timm would download from, if it would."""
    if config.get("hf_hub_id"):
        from huggingface_hub import hf_hub_url

        return hf_hub_url(config["hf_hub_id"], config.get("hf_hub_filename") or _HUB_FILES[0])
    url = config.get("url")
    return url[0] if isinstance(url, (tuple, list)) else url or None


def _cached(config: Mapping[str, Any], address: str) -> str | None:
    """The file of weights on this machine, where it was downloaded once."""
    if not config.get("hf_hub_id"):
        file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(address).path).name)
        return str(file) if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    for name in (config.get("hf_hub_filename"), *_HUB_FILES):
        found = try_to_load_from_cache(config["hf_hub_id"], name) if name else None
        if isinstance(found, str):
            return found
    return None


def _answers(address: str) -> bool:
    """Whether a host can be reached: else the hub tries for a minute before it says so."""
    url = urlparse(address)
    if url.scheme in urllib.request.getproxies():
        return True  # the proxy knows
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        with socket.create_connection((url.hostname or "", port), timeout=_PATIENCE_SECONDS):
            return True
    except OSError:
        return False
