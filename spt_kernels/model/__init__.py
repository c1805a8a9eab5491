"""What a model is: its parameters and what they are for, its head, what it must be to be tuned."""

from .anatomy import (
    backbone_numel,
    candidate_names,
    head_numel,
    innermost_blocks,
    possible_names,
    stem_names,
)
from .head import HeadPatterns, HeadSource, head_line, head_names, vocabulary_names
from .head_start import start_small
from .parameter_info import ParameterInfo, RowBlock, describe, guess, is_pointwise

__all__ = [
    "HeadPatterns",
    "HeadSource",
    "ParameterInfo",
    "RowBlock",
    "backbone_numel",
    "candidate_names",
    "describe",
    "guess",
    "head_line",
    "head_names",
    "head_numel",
    "innermost_blocks",
    "is_pointwise",
    "possible_names",
    "start_small",
    "stem_names",
    "vocabulary_names",
]
