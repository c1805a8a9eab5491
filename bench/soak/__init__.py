"""Reliability at scale: damaged files, killed processes, odd shapes, endless switches, threads."""
