"""Optimise a classifier for repeated forward and backward passes: fold batch norm, cast weights once, compile."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from stages.device import tune_malloc
from stages.errors import BadInput
from stages.model import LOW, Classifier
from stages.recipes import Compute

TOLERANCE = 1e-2
"""Largest change of a logit by folding, relative to the largest logit. Rounding changes 1e-5, TF32 1e-3, a wrong fold
far more."""


def optimized(model: Classifier, compute: Compute, keep: str | None = None) -> Classifier:
    """The same classifier, optimised for attacks; cached on the model for each set of options.

    Args:
        model: as returned by `load`: in evaluation mode, weights without gradient, float32.
        compute: precision, fold and compile; the batch size has no effect.
        keep: name of a module whose output must not change.

    Raises:
        BadInput: the network cannot be folded.
    """
    key = (compute.precision, compute.fold, compute.compile, keep)
    if key not in model.views:
        model.views[key] = _optimize(model, compute, keep)
    made: Classifier = model.views[key]
    return made


def _optimize(model: Classifier, compute: Compute, keep: str | None) -> Classifier:
    tune_malloc()
    made = (folded(model, keep) if compute.fold else model).using(compute.precision)
    if compute.precision in LOW:
        made = made.through(_cast(made.network, LOW[compute.precision]))
    return compiled(made, compute.compile)


def compiled(model: Classifier, how: str | bool) -> Classifier:
    """The classifier with its network compiled, sharing the weights.

    Args:
        how: False: unchanged; True: `torch.compile`; else the mode of `torch.compile`.
    """
    if how is False:
        return model
    made = model.through(copy.copy(model.network))
    made.network.compile(dynamic=False, mode=None if how is True else how)
    return made


def _cast(network: nn.Module, to: torch.dtype) -> nn.Module:
    """A copy with convolution and linear weights cast once, where autocast would cast them in every pass."""
    other = copy.deepcopy(network)
    for module in other.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(to)
    return other


def folded(model: Classifier, keep: str | None = None) -> Classifier:
    """The classifier with each batch norm folded into the preceding convolution (Jacob et al. 2018, eq. 14).

    In evaluation mode both are affine: w ← w γ / √(σ² + ε), b ← (b − μ) γ / √(σ² + ε) + β. A traced forward pass finds
    the convolution that feeds each batch norm, whatever the network's code. If the folded logits differ, something
    else uses the convolution's output, and the network is rejected. They are compared in float32: half precision
    rounds before a batch norm or after it, and the logits differ by more than `TOLERANCE`.

    Raises:
        BadInput: the folded network gives other logits, or fails.
    """
    x = torch.linspace(0, 1, 2 * torch.Size(model.design.shape).numel(), device=model.mean.device)
    x = x.view(2, *model.design.shape)
    with torch.no_grad():
        if not (pairs := _pairs(model, x, keep)):
            return model
        made = model.through(_with(model.network, pairs))
        try:
            wanted, found = (one.using("float32")(x) for one in (model, made))
        except Exception as error:  # a network may do anything with a module that is no longer a batch norm
            raise BadInput(_refusal(model, f"{type(error).__name__}: {error}")) from error
    largest = float(wanted.nan_to_num(0, 0, 0).abs().max())  # NaNs in the original are reported elsewhere
    if not torch.allclose(found, wanted, rtol=0, atol=TOLERANCE * largest, equal_nan=True):
        raise BadInput(_refusal(model, "it answers otherwise without its batch norm"))
    return made


def _refusal(model: Classifier, why: str) -> str:
    return f"arch {model.design.arch} cannot have its batch norm folded ({why}): add `fold: false`"


def _pairs(model: Classifier, x_NCHW: Tensor, keep: str | None) -> list[tuple[str, str]]:
    """Names of each convolution and the batch norm it feeds, if both run exactly once."""
    names = {module: name for name, module in model.network.named_modules()}
    gave: dict[int, tuple[nn.Module, Tensor]] = {}  # keeps the tensors alive, so that their ids stay unique
    found: list[tuple[nn.Module, nn.Module]] = []
    runs: Counter[nn.Module] = Counter()

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        runs[module] += 1
        if isinstance(module, nn.Conv2d):
            gave[id(output)] = (module, output)
        elif id(inputs[0]) in gave and module.running_mean is not None:
            found.append((gave[id(inputs[0])][0], module))

    watched = [m for m in names if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    handles = [module.register_forward_hook(record) for module in watched]
    try:
        model(x_NCHW)
    finally:
        for handle in handles:
            handle.remove()
    named = [(names[conv], names[norm]) for conv, norm in found if runs[conv] == runs[norm] == 1]
    return [pair for pair in named if keep is None or _inside(pair[0], keep) == _inside(pair[1], keep)]


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _with(network: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """A copy of the network with each pair fused into one convolution."""
    other = copy.deepcopy(network)
    for conv_name, norm_name in pairs:
        conv, norm = other.get_submodule(conv_name), other.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.weight, conv.bias = (nn.Parameter(value.detach(), requires_grad=False) for value in (weight, bias))
        other.set_submodule(norm_name, nn.Identity())
    return other.requires_grad_(False).to(memory_format=torch.channels_last)
