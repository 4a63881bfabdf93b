"""Projected gradient descent: the one loop shared by attacks, evaluations and training.

They differ only in the loss, the radius and the use of the result. x is in [0, 1], in pixel units; normalisation
happens inside the model.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from stages.norms import NORMS
from stages.recipes import Compute, Norm


class Descent:
    """PGD steps (see `pgd`), set up once for any number of batches of one shape.

    On a GPU, one step is captured as a CUDA graph: the same kernels in the same order, launched together. Small batches
    are bound by launch overhead otherwise.

    Args:
        loss: (x, *given) → a loss per sample, N (or their sum). It may keep state only by writing into `given` in
            place, and must not copy to or from the host.
        norm, eps, step_size, box: as in `pgd`.
        capture: turns a step into one that can be replayed: `captured` on a GPU; None: run eagerly.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        *,
        norm: Norm,
        eps: float | None,
        step_size: float,
        box: tuple[float, float] = (0.0, 1.0),
        capture: "Capture | None",
    ) -> None:
        self.loss, self.norm, self.eps, self.step_size, self.box = loss, norm, eps, step_size, box
        self.capture = capture
        self.repeat: Callable[[], None] | None = None
        self.held: list[Tensor] = []

    def __call__(self, x_NCHW: Tensor, *given: Tensor, steps: int, start: Tensor | None = None) -> Tensor:
        """The last iterate.

        Args:
            x_NCHW: float32, in [0, 1]; the centre of the ball.
            given: passed to the loss.
            steps: number of steps.
            start: first iterate. Default: x.
        """
        x = (x_NCHW if start is None else start).detach().clone()
        if self.capture is not None:
            return self._repeated(self.capture, x, x_NCHW, given, steps)
        for _ in range(steps):
            x = self._step(x, x_NCHW, *given)
        return x

    def _step(self, x: Tensor, centre: Tensor, *given: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(self.loss(x, *given).sum(), x)
        x = x.detach().sub_(direction(grad, self.norm), alpha=self.step_size)
        if self.eps is not None:
            x = project(x.sub_(centre), self.norm, self.eps).add_(centre)
        return x.clamp_(*self.box)

    def _repeated(self, capture: "Capture", x: Tensor, centre: Tensor, given: Sequence[Tensor], steps: int) -> Tensor:
        """The same loop on static tensors, as a CUDA graph requires."""
        if [t.shape for t in self.held] != [t.shape for t in (x, centre, *given)]:
            self.held, self.repeat = [t.detach().clone() for t in (x, centre, *given)], None
        else:
            for mine, theirs in zip(self.held, (x, centre, *given), strict=True):
                mine.copy_(theirs)

        def step() -> None:
            self.held[0].copy_(self._step(*self.held))

        for done in range(steps):
            if self.repeat is None and done == UNCAPTURED:
                self.repeat = capture(step)
            (self.repeat or step)()
        for mine, theirs in zip(self.held[2:], given, strict=True):
            theirs.copy_(mine)
        return self.held[0].clone()


Capture = Callable[[Callable[[], None]], Callable[[], None]]

UNCAPTURED = 2
"""Warm-up steps before capture: they compile, choose kernels and initialise libraries."""


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """A step as a CUDA graph, or unchanged if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=_keeper().pool(), capture_error_mode="thread_local"):
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0]
        warnings.warn(f"a step is not one CUDA graph, but launched kernel by kernel: {why}", stacklevel=2)
        return step
    return graph.replay


def graphs(compute: Compute, where: torch.device) -> Capture | None:
    """How to capture the steps: not at all on a CPU, or where `torch.compile` captures graphs itself."""
    return None if compute.compile == "reduce-overhead" or where.type != "cuda" else captured


@cache
def _keeper() -> torch.cuda.CUDAGraph:
    """A graph that is never freed: all graphs of the process share its memory pool, since no two run at once."""
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        x.add_(1)
    return graph


def pgd(
    loss: Callable[[Tensor], Tensor],
    x_NCHW: Tensor,
    *,
    norm: Norm,
    eps: float | None,
    step_size: float,
    steps: int,
    start: Tensor | None = None,
    box: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Minimise a loss within a ball around x and the box [0, 1], and return the last iterate.

    Each step: the gradient of the summed loss, normalised per sample (L2) or its sign (L∞); a step of `step_size`
    against it; projection onto the ball; clipping to the box. The same algorithm as in robustness, torchattacks and
    foolbox (Madry et al. 2018, eq. 3, normalised for L2).

    Args:
        loss: x → a loss per sample, N (or their sum); samples must not depend on each other.
        x_NCHW: float32, in [0, 1]; the centre of the ball.
        norm: of the ball and of the step.
        eps: radius in pixel units; None: no ball.
        step_size: length of a step in pixel units.
        steps: number of steps, of one forward and one backward pass each.
        start: first iterate. Default: x.
        box: another box, such as [-1, 1] for a perturbation.

    Returns:
        float32, N × C × H × W; within `eps` of x up to float32 rounding.
    """
    once = Descent(loss, norm=norm, eps=eps, step_size=step_size, box=box, capture=None)
    return once(x_NCHW, steps=steps, start=start)


def direction(grad_NCHW: Tensor, norm: Norm) -> Tensor:
    """The steepest unit step per sample: the gradient over its L2 norm, or its sign. A zero gradient stays zero."""
    return NORMS[norm].direction(grad_NCHW)


def project(delta_NCHW: Tensor, norm: Norm, eps: float) -> Tensor:
    """Project a perturbation onto the ball."""
    return NORMS[norm].project(delta_NCHW, eps)


AT_ONCE = 2**22
"""Values that are rounded at once: temporaries take eight bytes each."""


def quantize(x_NCHW: Tensor, clean_NHWC: np.ndarray, norm: Norm, eps: float) -> np.ndarray:
    """Round images to 8 bits within the ball (`round_in_ball`), on the device of x: uint8, N × H × W × C."""
    clean = torch.from_numpy(np.require(clean_NHWC, requirements=["C", "W"])).permute(0, 3, 1, 2)
    some = max(1, AT_ONCE // x_NCHW[:1].numel()) if len(clean) else 1
    parts = zip(*(torch.split(images, some) for images in (x_NCHW, clean.to(x_NCHW.device))), strict=True)
    saved = torch.cat([round_in_ball(x, near, norm, eps) for x, near in parts])
    return np.asarray(saved.permute(0, 2, 3, 1).contiguous().cpu())


def round_in_ball(x_NCHW: Tensor, clean_NCHW: Tensor, norm: Norm, eps: float) -> Tensor:
    """Round to 8 bits such that the saved image lies inside the ball, not just near it.

    Every value is rounded to its nearest level. If the result leaves the L2 ball (plain rounding turns .500 into .501),
    the values that rounding moved outward the most go back one level, as few as necessary. The budget is in whole
    levels, so the result is exact. For L∞ the levels are clamped.

    Args:
        x_NCHW: float, in [0, 1], inside the ball up to rounding.
        clean_NCHW: uint8; the centre.
        norm, eps: the ball, in pixel units of [0, 1].

    Returns:
        uint8, N × C × H × W.
    """
    clean = clean_NCHW.flatten(1).to(torch.int64)
    exact = (x_NCHW.flatten(1).double() * 255).clamp(0, 255) - clean
    moved = NORMS[norm].pull_in(exact.round().to(torch.int64), exact, 255 * eps)
    return (clean + moved).to(torch.uint8).view_as(clean_NCHW)
