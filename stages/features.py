"""A network as a map from images to features: the input of its last linear layer, or a module's output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stages.design import Design
from stages.errors import BadInput
from stages.model import Classifier

FLAT = frozenset(
    [F.relu, F.relu6, F.hardtanh, F.hardtanh_, F.hardswish, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_]
)
"""Activations with flat regions: no gradient passes there, so a search that starts there cannot leave."""

FLOORS = frozenset(
    getattr(place, name)
    for place in (torch, Tensor)
    for name in ("clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_")
) | {F.threshold}
"""Functions that are flat below a floor. They count as activations only at floor 0: others may guard a division."""


class Penultimate:
    """Maps images in [0, 1], N × C × H × W, to features, N × D, float32.

    The last flat activation (ReLU and the like) before the features has a straight-through gradient: its output is
    unchanged, but a search can increase a feature that is zero, which is impossible with ReLU's own gradient.

    Args:
        model: the classifier; it computes at its own precision.
        layer: name of the module whose output is the features (its last output, if it runs more than once); by default
            the features are the input of the last linear layer.

    Raises:
        BadInput: there is no such layer, or its output is no tensor with one row per image.
    """

    def __init__(self, model: Classifier, layer: str | None = None) -> None:
        self.model, self.layer = model, layer
        self.module = head(model)[1] if layer is None else _module(model, layer)
        features, self.flat = _probe(model, lambda x: self._run(x, passed=None))
        if features is None or features.ndim < 2 or len(features) != PROBES:
            raise BadInput(
                f"layer {layer or 'before the last linear one'} of {model.design.arch} gives no tensor with a row for "
                "each image: name another with `layer`"
            )
        self.width = features[0].numel()

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        features, _ = self._run(x_NCHW, passed=self.flat)
        assert features is not None
        return features.flatten(1).float()

    def _run(self, x_NCHW: Tensor, passed: int | None) -> tuple[Tensor | None, int]:
        """The features, copied before any in-place change, and the number of flat activations before them.

        The features are None if the module does not run or its output is no tensor.
        """
        found: tuple[Tensor | None, int] = (None, 0)

        def keep(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal found
            value = inputs[0] if self.layer is None else output
            found = (value.clone() if isinstance(value, Tensor) else None, activations.count)

        with _StraightThrough(passed) as activations, _hooked([self.module], keep):
            self.model(x_NCHW)
        return found


def head(model: Classifier) -> tuple[str, nn.Linear]:
    """The last linear layer that runs, and its name in the network.

    Raises:
        BadInput: the network has no linear layer.
    """
    linear = {module: name for name, module in model.network.named_modules() if isinstance(module, nn.Linear)}
    ran: list[nn.Linear] = []
    with _hooked(linear, lambda module, *_: ran.append(module)):
        _probe(model, model)
    if not ran:
        raise BadInput(
            f"arch {model.design.arch} has no linear layer: name the layer of its features with `layer`; a linear "
            "probe needs a model that has one"
        )
    return linear[ran[-1]], ran[-1]


@cache
def refuse_without(design: Design, layer: str | None, here: Path) -> None:
    """Build a network and look for its features before any work is done; the result is cached per design.

    Raises:
        BadInput: it has no such features.
    """
    Penultimate(Classifier(design, here).eval(), layer)


PROBES = 2  # empty images in a trial pass


def _probe(model: Classifier, run: Callable[[Tensor], Any]) -> Any:
    """Pass empty images through in evaluation mode, so that batch norm's statistics do not change."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return run(torch.zeros(PROBES, *model.design.shape, device=model.mean.device))
    finally:
        for module, mode in modes:
            module.training = mode


def _module(model: Classifier, layer: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.network.named_modules())
    if layer not in modules:
        last = ", ".join(list(modules)[-5:])
        raise BadInput(f"arch {model.design.arch} has no layer {layer!r}: its last ones are {last}")
    return modules[layer]


@contextmanager
def _hooked(modules: Any, hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _StraightThrough(TorchFunctionMode):
    """Counts calls of flat activations, and passes the gradient straight through the `passed`th.

    It intercepts functions, not modules: networks call one `nn.ReLU` in many places, or `F.relu` without a module.
    """

    def __init__(self, passed: int | None) -> None:
        super().__init__()
        self.passed, self.count = passed, 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        floored = function in FLOORS and _floor(*args[1:2], **kwargs or {}) == 0
        if args and (function in FLAT or floored):
            self.count += 1
            if self.count == self.passed:
                return _straight(function, *args, **kwargs or {})
        return function(*args, **kwargs or {})


def _floor(floor: Any = None, **named: Any) -> float | None:
    """The floor in a call of one of FLOORS, if it is a number."""
    said = named.get("min", named.get("threshold", floor))
    return said if isinstance(said, int | float) else None


def _straight(function: Callable[..., Tensor], x: Tensor, *rest: Any, **named: Any) -> Tensor:
    apart = x.detach().clone()
    y = function(apart, *rest, **named)
    straight = y + (x - x.detach())  # the bracket is zero and has the gradient of x
    return x.copy_(straight) if y is apart else straight
