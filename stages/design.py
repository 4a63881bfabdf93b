"""What a classifier is rebuilt from, apart from its weights. Free of torch, so that it imports fast."""

from dataclasses import asdict
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from stages.errors import BadData

Side = Annotated[int, Field(ge=1, le=2**14)]
Output = Annotated[int, Field(ge=0, lt=2**20)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Design:
    """Everything but the weights that is needed to rebuild a classifier.

    Attributes:
        arch: as `nets.build` takes it, from the experiment. An arch read from a store is only compared with it, never
            imported.
        classes: number of classes.
        shape: channels, height and width of the images.
        mean: per channel; subtracted.
        std: per channel; divided by.
        outputs: for a network with more classes: the outputs that are kept, in this order; `classes` of them.
        of: number of classes of that network.
        logit_scale: factor of the network's outputs; None is 1.
    """

    arch: Annotated[str, Field(max_length=512)]
    classes: Annotated[int, Field(ge=1, lt=2**20)]
    shape: tuple[Annotated[int, Field(ge=1, le=16)], Side, Side]
    mean: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]
    outputs: tuple[Output, ...] | None = None
    of: Annotated[int, Field(ge=1, lt=2**20)] | None = None
    logit_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def network_classes(self) -> int:
        """Number of outputs of the network itself."""
        return self.classes if self.of is None else self.of

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Design":
        """Read a design from a manifest.

        Raises:
            BadData: a field is missing, unknown or of another type.
        """
        try:
            return cls(**facts)
        except (ValidationError, TypeError) as error:
            raise BadData("the design of a model is damaged") from error
