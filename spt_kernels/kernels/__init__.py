"""Triton kernels and their launchers, one file per op; importing one of them imports Triton."""
