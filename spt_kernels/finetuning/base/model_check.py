"""Whether a model takes the images it is to be given and answers with a score per class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# What a forward raises on an image that it is not made for
_REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, IndexError, NotImplementedError)


def check_scores(model: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Run the model on one black image, and refuse what could not be trained or tested.

    Args:
        model: in evaluation mode.
        image_shape: channels, height, width.
        num_classes: of the task.

    Raises:
        ValueError: it fails on such an image, or gives something other than `[1, num_classes]`.
    """
    name = type(model).__name__
    channels = image_shape[0]
    parameters = dict(model.named_parameters())
    first = next((p for p in parameters.values() if p.ndim == 4), None)  # of the stem
    where = next(iter(parameters.values())) if parameters else torch.empty(0)
    image = torch.zeros(1, *image_shape, device=where.device, dtype=where.dtype)
    try:
        with torch.no_grad():
            scores = model(image)
    except _REFUSALS as error:
        if first is not None and first.shape[1] != channels:
            raise ValueError(
                f"mean: expected one value per channel that {name} takes, {first.shape[1]}, "
                f"got {channels}"
            ) from error
        shape = " × ".join(map(str, image_shape))
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"image_size: {name} cannot take images of {shape}: {reason}") from error
    if not isinstance(scores, Tensor):
        got = f"a {type(scores).__name__}"
    elif tuple(scores.shape) != (1, num_classes):
        got = " × ".join(map(str, scores.shape))
    else:
        return
    raise ValueError(
        f"model_arg: {name} is to give one score per class, 1 × {num_classes}, and gives {got}: "
        "leave out what changes its output"
    )
