"""`python -m spt_kernels`, the same as `spt-kernels`."""

from __future__ import annotations

from .cli import main

main()
