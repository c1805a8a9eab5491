"""Frozen weights on the host, on the device only while their block runs."""

from .choice import WHAT
from .offloading import Offload, blocks_on_host, brought_back, offload

__all__ = ["WHAT", "Offload", "blocks_on_host", "brought_back", "offload"]
