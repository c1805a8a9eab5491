"""Many tasks over one base model in memory: switched in a moment, mixed within a batch."""

from .task_bank import TaskBank

__all__ = ["TaskBank"]
