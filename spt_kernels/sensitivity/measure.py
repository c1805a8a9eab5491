"""How sensitive a task's loss is to each parameter: the scores of Algorithm 1."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..model import (
    HeadPatterns,
    HeadSource,
    ParameterInfo,
    candidate_names,
    describe,
    head_line,
    head_names,
    possible_names,
    vocabulary_names,
)
from ..model.check import (
    check_are_matrices,
    check_are_real,
    check_head_is_float,
    check_trainable_itself,
)
from ..model.quantized import logical_numel, quantized_names
from ..model.tied import check_own_memory, sharing_names
from .per_sample.batches import Samples
from .per_sample.counted import on_first_counted
from .per_sample.last import last_before_loss
from .per_sample.losses import LossFunction, PerSampleLoss
from .per_sample.measurement import logger, measure
from .per_sample.own_loss import loss_of_batches
from .per_sample.progress import reporting
from .per_sample.restoration import borrowed, frozen
from .per_sample.stand_in import stand_ins
from .scores import Sensitivity
from .shared import measured_together


@torch.inference_mode(False)  # which a caller may be in, and in which nothing has a gradient
def measure_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    num_samples: int = 800,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    head: HeadPatterns | None = None,
    device: torch.device | str | None = None,
    train: bool = False,
    progress: bool | Callable[[int, int], None] = True,
    group: Any = None,
) -> Sensitivity:
    """Measure how much each parameter matters to a task: the paper's Algorithm 1, batched.

    The score of a parameter is Σ g² over samples, where g is the gradient of *that sample's* loss:
    `loss_fn` is evaluated on one sample at a time, so its reduction does not matter, and so is the
    loss that a model of transformers computes itself: a sentence's is the mean over its own tokens,
    not its share of the mean over the tokens of the batch. Where such a loss does not part into
    samples, each sample is measured with a forward of its own, and a log line says so. Forward and
    backward run on whole batches, at the cost of one ordinary training step each, under the
    caller's autocast. Uses of a parameter that cannot be observed are found by a probe on two
    samples, and such parameters are measured exactly but slowly, one sample at a time; a log line
    and `Sensitivity.fallback` name them.

    Candidates are weights and biases of all Linear, Conv2d and norm modules but those of head and
    stem; tokens, tables and scales can be added by pattern, and so can head and stem. The head is
    what comes last on the way to the loss, whatever it is called: the layers after which nothing
    with a matrix follows. A model whose loss reads features (what a norm made, or a residual sum)
    has none. Nor has a language model, whose words (`get_output_embeddings`) are no task's: they
    are candidates, unless they are tied to the table that words are read by. `Sensitivity.head` and
    `head_source` tell what was found, and so does a log line.

    A parameter that no sample's loss depends on (an unused tower, an auxiliary head) scores 0, and
    a log line and `Sensitivity.idle` name it. A sample without labels, of which every target is the
    loss function's `ignore_index`, or of which the loss is NaN whatever the output, or a constant,
    counts as none, and another one is drawn in its place.

    The model is left as it was: mode, `requires_grad`, gradients, buffers, hooks, and without what
    forwards leave in it. Its dropout, when `train` is set, draws from the global random state;
    nothing else does.

    Memory is that of a forward and backward pass which computes no gradients of parameters, and of
    the scores, 4 bytes a number, which are there from the first measured batch on. What is measured
    one sample at a time has its gradients one parameter after the other; that of all at a time is
    there only where reentrant checkpoints bring gradients in parts.

    With a `group` its processes share the work: each calls this with the same model and arguments
    and with `batches` of its own, as a DataLoader with a `DistributedSampler` gives them, measures
    its share of the samples, and gets the scores of all. They are summed in the order of ranks, so
    that every process has the same bits, and `allocate` makes the same plan of them everywhere.

    Args:
        model: called as `model(input)`; as `model(**input)` where the input is a mapping whose keys
            its forward takes by name.
        batches: yields `(input, target)` pairs, for example a DataLoader. Inputs and targets may
            be tensors or nests of them; each has one row per sample. Or yields mappings, as for
            transformers: `model(**batch)`, with labels inside.
        loss_fn: `loss_fn(output, target)`, a scalar; called on batches of one sample. Of a mapping
            the target is its `labels`, which the model is then not given. None: cross-entropy of
            pairs; of mappings the `loss` in the model's output.
        num_samples: how many samples to use, exactly; all there are when `batches` has fewer
            (`Sensitivity.num_samples` tells). Of a group: in all processes together, of which rank
            `r` of `n` measures samples `r`, `r + n`, and so on; one that has none helps to sum.
        include: shell-style patterns of parameter names to measure besides the default candidates.
            What is included of a head that was found is no longer part of it.
        exclude: patterns of names to leave out.
        head: what to train whole, outside any budget, instead of what is found: names of parameters
            or modules, or patterns of them, as `"score"` or `["decode_head.*"]`; `()` or `"none"`
            for nothing. None of it is measured.
        device: where batches are moved; by default where the model is.
        train: measure in training mode instead of eval mode.
        progress: draw a bar on a terminal; or a function called with (samples done, wanted), which
            are those of this process.
        group: of `torch.distributed`, as `torch.distributed.group.WORLD`, whose processes measure
            together; None measures in this process alone, whatever others do.

    Returns:
        The scores in fp32, on the device of each parameter.

    Raises:
        OtherProcessFailed: another process of the group cannot measure; says which, and why.
        TypeError: an argument, or the labels, are of the wrong type.
        ValueError: no samples, or none with a label; labels out of range; a loss that is no scalar,
            not finite, fails, or depends on nothing of the model that is measured; samples that
            influence each other; a pattern that matches nothing; scores that are not finite, or all
            zero; a model that is compiled, wrapped for data parallelism, tuned, on the meta device,
            or made in inference mode; the head, or what is included, lies in the memory of another
            parameter; the models of a group's processes differ.
    """
    processes = Processes.of(group)
    measured = measured_together(
        processes,
        model,
        num_samples,
        partial(
            _measure,
            model,
            batches,
            loss_fn,
            include=include,
            exclude=exclude,
            head=head,
            device=device,
            train=train,
            progress=progress if callable(progress) else progress and processes.is_first,
        ),
    )
    _check_any(measured)
    return measured


def _measure(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None,
    num_samples: int,
    *,
    include: Iterable[str],
    exclude: Iterable[str],
    head: HeadPatterns | None,
    device: torch.device | str | None,
    train: bool,
    progress: bool | Callable[[int, int], None],
) -> Sensitivity:
    """What this process measures; the arguments are those of `measure_sensitivity`."""
    _check_model(model)
    parameters = dict(model.named_parameters())
    given = None if head is None else head_names(model, head)
    # before any sample is drawn
    every = possible_names(model, include, exclude, head=given or ())
    where = torch.device(device) if device is not None else parameters[every[0]].device
    loss, pairs = loss_of_batches(loss_fn, batches)
    samples = Samples(pairs, num_samples, where, loss.labelled)
    quantized = quantized_names(model)
    by_any_name = dict(model.named_parameters(remove_duplicate=False))
    shared = sharing_names(by_any_name.items())
    with (
        stand_ins(model),
        borrowed(model, train=train),
        frozen(loss_fn),
        reporting(progress, num_samples) as report,
    ):
        last = _found_head(model, loss, samples, include) if given is None else given
        check_head_is_float(last, quantized)
        names = candidate_names(model, include, exclude, head=last)
        if given is not None:  # in spite of what is included
            names = [name for name in names if name not in given]
            if not names:
                raise ValueError(f"head: {head!r} leaves nothing to measure")
        check_own_memory([*last, *names], by_any_name, shared)
        info, tokens, layers = _described(model, names)
        check_are_matrices(info, quantized)
        check_are_real(names, parameters)
        scores, n_measured, methods = measure(
            model,
            loss,
            samples,
            names,
            tokens,
            layers.values(),
            lambda done: report(done, num_samples),
        )
    for name, module in layers.items():
        if (
            module not in methods.called
        ):  # BEiT, EVA and Swin V2 read the weight of `qkv` themselves
            info[name] = info[name].read()
    remaining = tuple(name for name in last if name not in info)
    # a head all of which is included has been decided on
    source: HeadSource = "loss" if given is None and (remaining or not last) else "given"
    level = logging.INFO if remaining or source == "given" else logging.WARNING
    logger.log(level, "head: %s", head_line(remaining, source, info))
    return Sensitivity(
        scores=scores,
        info=info,
        num_samples=n_measured,
        model_name=_model_name(model),
        head=remaining,
        backbone_numel=sum(
            logical_numel(parameter)
            for name, parameter in parameters.items()
            if name in info or name not in last
        ),
        fallback=methods.one_by_one,
        head_source=source,
        idle=methods.idle,
    )


def _found_head(
    model: nn.Module, loss: PerSampleLoss, samples: Samples, include: Iterable[str]
) -> tuple[str, ...]:
    """The parameters that come last before the loss, if there is more to the model than these."""
    last = on_first_counted(
        model, loss, samples, lambda batch: last_before_loss(model, loss, batch)
    )
    words = vocabulary_names(model)
    last = tuple(name for name in last if name not in words)
    others = set(possible_names(model, include, head=())).difference(last)
    return last if others else ()


def _described(
    model: nn.Module, names: Collection[str]
) -> tuple[dict[str, ParameterInfo], tuple[str, ...], dict[str, nn.Module]]:
    """What each parameter is; which are tokens of all samples; and the layers of the others."""
    described = describe(model)
    info = {name: described[name] for name in names}
    tokens = tuple(
        name
        for name, what in info.items()
        if what.kind == "other" and len(what.shape) > 1 and what.shape[0] == 1
    )
    layers = {
        name: model.get_submodule(name.rpartition(".")[0])
        for name, what in info.items()
        if what.takes_modules or what.kind in ("conv2d", "norm", "bias")
    }
    return info, tokens, layers


@torch.inference_mode(False)
def find_head(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
) -> tuple[str, ...]:
    """Name the parameters of a model's head as `measure_sensitivity` finds it.

    One forward pass of two samples is enough. The model is left as it was.

    Args:
        model: called as `model(input)`, where it is.
        batches: yields `(input, target)` pairs, or mappings.
        loss_fn: as `measure_sensitivity` has it.

    Returns:
        Names in the model's order; none where the loss reads features, or there is nothing else.
    """
    _check_model(model)
    loss, pairs = loss_of_batches(loss_fn, batches)
    where = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    samples = Samples(pairs, 2, where, loss.labelled)
    with stand_ins(model), borrowed(model, train=False), frozen(loss_fn):
        return _found_head(model, loss, samples, ())


def _check_model(model: Any) -> None:
    """Raise unless `model` is a plain module, whose names are those that `apply` will meet."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_trainable_itself(model, "measure")
    if hasattr(model, "spt_tuning"):
        raise ValueError("model: expected a plain model, got a tuned one: merge or unload it first")
    if hasattr(model, "spt_approximation"):
        raise ValueError(
            "model: expected exact gradients, got approximate ones: approximate(model) makes them "
            "exact, and may be called again for training"
        )


def _check_any(scores: Mapping[str, Tensor]) -> None:
    """Raise when no gradient arrived anywhere."""
    if not any(bool(score.any()) for score in scores.values()):
        raise ValueError(
            "every sensitivity is zero: no gradient reaches a candidate parameter. A head that is "
            "all zeros, as timm makes some new ones, stops them: initialise its weight, for "
            "example with nn.init.trunc_normal_(model.get_classifier().weight, std=0.02). Nor is "
            "there one of a loss that compares samples, as contrastive ones do: one alone has none"
        )


def _model_name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    return name or type(model).__name__
