"""The folder that a run writes: its files, what is shared, kept to go on with, and logged."""
