"""Make a classifier ready for passes without number: the same function, in fewer and cheaper operations."""

import copy
import ctypes
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from stages.errors import BadInput
from stages.model import LOW, Classifier
from stages.recipes import Compute

TOLERANCE = 1e-2
"""Of the largest logit: what folding may change. Rounding changes 1e-5 of it, TF32 of a GPU 1e-3, a wrong fold all."""


def prepared(model: Classifier, compute: Compute, keep: str | None = None) -> Classifier:
    """The same classifier, to search with; made once for each way to compute.

    Args:
        model: as `load` gives it: in evaluation mode, weights without gradient, float32.
        compute: precision, and whether to fold and compile; the batch size plays no part.
        keep: name of a module of the network whose output stays what it is.

    Raises:
        BadInput: the network cannot be folded.
    """
    key = (compute.precision, compute.fold, compute.compile, keep)
    if key not in model.views:
        model.views[key] = _prepare(model, compute, keep)
    made: Classifier = model.views[key]
    return made


def _prepare(model: Classifier, compute: Compute, keep: str | None) -> Classifier:
    keep_memory()
    made = (folded(model, keep) if compute.fold else model).using(compute.precision)
    if compute.precision in LOW:
        made = made.through(_cast(made.network, LOW[compute.precision]))
    return compiled(made, compute.compile)


def compiled(model: Classifier, how: str | bool) -> Classifier:
    """The same classifier, the same weights, its network compiled: not at all, or in a mode of `torch.compile`."""
    if how is False:
        return model
    made = model.through(copy.copy(model.network))
    made.network.compile(dynamic=False, mode=None if how is True else how)
    return made


def _cast(network: nn.Module, to: torch.dtype) -> nn.Module:
    """A copy with the weights of convolutions and linear layers as autocast would make them anew in every pass."""
    other = copy.deepcopy(network)
    for module in other.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(to)
    return other


def folded(model: Classifier, keep: str | None = None) -> Classifier:
    """The classifier with each batch norm inside the convolution whose output it takes (Jacob et al. 2018, eq. 14).

    In evaluation mode both are affine: w ← w γ / √(σ² + ε), b ← (b − μ) γ / √(σ² + ε) + β. What feeds what is seen by
    watching a pass, so that any code of a network will do; where the folded network then answers otherwise,
    something else has a use for what the convolution gives.

    Raises:
        BadInput: the folded network answers otherwise, or not at all.
    """
    x = torch.linspace(0, 1, 2 * torch.Size(model.design.shape).numel(), device=model.mean.device)
    x = x.view(2, *model.design.shape)
    with torch.no_grad():
        if not (pairs := _pairs(model, x, keep)):
            return model
        made = model.through(_with(model.network, pairs))
        try:
            wanted, found = model(x), made(x)
        except Exception as error:  # whatever a network does with a module that is no batch norm any more
            raise BadInput(_refusal(model, f"{type(error).__name__}: {error}")) from error
    largest = float(wanted.nan_to_num(0, 0, 0).abs().max())  # a broken network is for others to find fault with
    if not torch.allclose(found, wanted, rtol=0, atol=TOLERANCE * largest, equal_nan=True):
        raise BadInput(_refusal(model, "it answers otherwise without its batch norm"))
    return made


def _refusal(model: Classifier, why: str) -> str:
    return f"arch {model.design.arch} cannot have its batch norm folded ({why}): add `fold: false`"


def _pairs(model: Classifier, x_NCHW: Tensor, keep: str | None) -> list[tuple[str, str]]:
    """Names of each convolution and of the batch norm that takes its output, where both run once."""
    names = {module: name for name, module in model.network.named_modules()}
    gave: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensors too: an id is one's own only as long as it lives
    found: list[tuple[nn.Module, nn.Module]] = []
    runs: Counter[nn.Module] = Counter()

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        runs[module] += 1
        if isinstance(module, nn.Conv2d):
            gave[id(output)] = (module, output)
        elif id(inputs[0]) in gave and module.running_mean is not None:
            found.append((gave[id(inputs[0])][0], module))

    watched = [m for m in names if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    handles = [module.register_forward_hook(watch) for module in watched]
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
    """A copy with each pair as one convolution."""
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


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_memory() -> None:
    """Have the C library keep what is freed: each step asks for the same memory, and the kernel zeroes what is new."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
