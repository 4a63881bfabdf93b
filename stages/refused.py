"""Turn device errors (out of memory, no deterministic kernel) into messages for the user."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stages.errors import BadInput, TooLarge
from stages.model import Classifier
from stages.recipes import Compute, Evaluate, Train

NO_KERNEL = re.compile(r"(\w+) does not have a deterministic implementation")
GIB = 2**30


@contextmanager
def explained(recipe: Compute | Train | Evaluate, *models: Classifier) -> Iterator[None]:
    """Translate errors of the device while these models run.

    Neither error is retried, nor is the batch halved: another batch shape gives other bits.

    Raises:
        BadInput: a layer has no deterministic kernel.
        TooLarge: the GPU is out of memory.
    """
    free = _free()
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TooLarge(f"batch_size {recipe.batch_size} is more than the GPU has memory for{free}: lower it") from error
    except RuntimeError as error:
        if (found := NO_KERNEL.search(str(error))) is None:
            raise
        named = [f"layer {layer} of {model.design.arch}" for model in models if (layer := _without_kernel(model))]
        raise BadInput(
            f"{', '.join(dict.fromkeys(named)) or 'a step'} has no deterministic kernel here ({found[1]}): add "
            "`deterministic: false`, and the bytes will differ from run to run"
        ) from error


def _free() -> str:
    """GPU memory that no other process holds, and the total, as text; empty without a GPU."""
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return f" ({free / GIB:.1f} of {total / GIB:.1f} GiB were free)"


def _without_kernel(model: Classifier) -> str | None:
    """Name of the layer without a deterministic kernel: the last one entered in a forward or backward pass."""
    begun: list[str] = []

    def enters(name: str) -> None:
        def after(_: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda grad: begun.append(name))  # type: ignore[no-untyped-call]

        layer = model.network.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(lambda *_: begun.append(name)))
        handles.append(layer.register_forward_hook(after))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name, layer in model.network.named_modules():
        if not any(True for _ in layer.children()):
            enters(name)
    try:
        x = torch.zeros(2, *model.design.shape, device=model.mean.device, requires_grad=True)
        torch.autograd.grad(model(x).sum(), x)
    except RuntimeError as error:
        return begun[-1] if begun and NO_KERNEL.search(str(error)) else None
    finally:
        for handle in handles:
            handle.remove()
    return None
