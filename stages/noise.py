"""Random points in a ball around each image: noise on its surface, and random starts in its volume."""

import numpy as np
import torch
from torch import Tensor

from stages.norms import NORMS
from stages.pgd import direction, project, quantize
from stages.recipes import Ball, Perturbation
from stages.seeds import generator, torch_seed
from stages.tensors import to_unit


def noise(pixels_NHWC: np.ndarray, ball: Perturbation, seed: int, index: np.ndarray) -> np.ndarray:
    """8-bit images with a random perturbation on the surface of the ball: the control of an attack."""
    return quantize(noisy(to_unit(pixels_NHWC), ball, seed, index), pixels_NHWC, ball.norm, ball.eps)


def noisy(x_NCHW: Tensor, ball: Perturbation, seed: int, index: np.ndarray) -> Tensor:
    """Images in [0, 1] with a random perturbation on the surface of the ball, drawn per image from (seed, index)."""
    draws = [torch.Generator().manual_seed(torch_seed(seed, "noise", int(i))) for i in index]
    gauss = torch.stack([torch.randn(x_NCHW.shape[1:], generator=draw) for draw in draws]).to(x_NCHW.device)
    return (x_NCHW + project(direction(gauss, ball.norm) * ball.eps, ball.norm, ball.eps)).clamp(0, 1)


def random_start(x_NCHW: Tensor, ball: Ball, seed: int, index: np.ndarray, restart: int) -> Tensor:
    """A point drawn uniformly from the ball around each image, clipped to the box; from (seed, index, restart)."""
    draws = [generator(seed, f"restart {restart}", int(i)) for i in index]
    delta = NORMS[ball.norm].uniform(draws, x_NCHW.shape[1:])
    return (x_NCHW + ball.eps * delta.to(x_NCHW.device)).clamp(0, 1)
