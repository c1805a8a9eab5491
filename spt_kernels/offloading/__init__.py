"""Frozen weights and optimizer state on the host, on the device only while they are used."""

from .choice import WHAT
from .offloaded_adamw import OffloadedAdamW
from .offloading import Offload, blocks_on_host, brought_back, offload

__all__ = ["WHAT", "Offload", "OffloadedAdamW", "blocks_on_host", "brought_back", "offload"]
