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
"""Activations that are flat somewhere: there they pass no gradient on, and a search that starts there stays there."""

FLOORS = frozenset(
    getattr(place, name)
    for place in (torch, Tensor)
    for name in ("clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_")
) | {F.threshold}
"""Functions that are flat below their floor. Only those with floor 0 are an activation: others may guard a division."""


class Penultimate:
    """Images in [0, 1], N × C × H × W, to features, N × D, in float32.

    The last flat activation (ReLU and the like) before the features hands its gradient straight through: what it
    gives is unchanged, but a feature that is zero can be made to grow (a ReLU-dead feature could not).

    Args:
        model: the classifier; it computes at its own precision.
        layer: name of a module of its network, whose output is the features (the last, where it runs more than
            once); by default the features are the input of the last linear layer.

    Raises:
        BadInput: there is no such layer, or it gives no tensor with a row for each image.
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
        """The features, as they are before anything changes them in place, and how many flat activations came before.

        They are None where the module does not run, or gives no tensor.
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
    """Build a network and find its features, before any work is done; one design is tried once.

    Raises:
        BadInput: it has none.
    """
    Penultimate(Classifier(design, here).eval(), layer)


PROBES = 2  # empty images sent through to see what runs


def _probe(model: Classifier, run: Callable[[Tensor], Any]) -> Any:
    """Send empty images through, in evaluation mode, so that nothing is learned from them."""
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
    """Counts the flat activations that are called, and lets the gradient pass straight through the `passed`th.

    It sees functions, not modules: networks call one `nn.ReLU` in many places, in place, or `F.relu` without a module.
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
    """The floor of a call to one of FLOORS, where it is a number."""
    said = named.get("min", named.get("threshold", floor))
    return said if isinstance(said, int | float) else None


def _straight(function: Callable[..., Tensor], x: Tensor, *rest: Any, **named: Any) -> Tensor:
    apart = x.detach().clone()
    y = function(apart, *rest, **named)
    straight = y + (x - x.detach())  # the bracket is zero, with the gradient of x
    return x.copy_(straight) if y is apart else straight
