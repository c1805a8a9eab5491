"""`python -m spt_kernels.cli`, the same as `spt-kernels`."""

from __future__ import annotations

from . import main

main()
