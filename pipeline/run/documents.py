"""The JSON documents of a store, and the checks that they must pass.

A store is data, and may be shared, damaged or written by somebody else. A document is used only if its seal is valid
(`Store.find_json`) and it passes the model of its kind: every name matches a pattern, every number is one, and no file
name can lead to another folder.
"""

import json
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

from pipeline.experiment.spec import Name
from pipeline.store import Store
from stages.errors import BadData


def _text(pattern: str, most: int = 256) -> Any:
    return Annotated[str, StringConstraints(pattern=pattern, max_length=most)]


GROUP = "(datasets|models|evaluations)"
Group = _text(f"^{GROUP}$")
NodeName = Name
NodeId = _text(f"^{GROUP}/[A-Za-z0-9][A-Za-z0-9_.-]*(@[A-Za-z0-9_.,=-]+)?$")
Version = _text("^[0-9a-f]{16}$")
Folder = _text(f"^{GROUP}/[A-Za-z0-9][A-Za-z0-9_.-]*(@[A-Za-z0-9_.,=-]+)?/[0-9a-f]{{16}}$", 512)
Sha = _text("^[0-9a-f]{64}$")
ShardName = _text("^[a-z][a-z0-9_]*-[0-9]{6,9}$")
FileName = _text(r"^[a-z][a-z0-9_-]*\.[a-z]+$")
RunName = _text("^[0-9]{8}-[0-9]{6}-[A-Za-z0-9][A-Za-z0-9_.-]*-[0-9a-f]{4}$")
Word = _text("^[a-z_]+$")
Moment = _text(r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?\+00:00$")
Count = Annotated[int, Field(ge=0, lt=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]


class Document(BaseModel):
    """Base of the models. Unknown keys are ignored: a later version may have added them."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def fits(kind: Any, value: Any) -> bool:
    """Whether a value is valid for a `Document`, or for one of the names above."""
    try:
        _adapter(kind).validate_json(json.dumps(value), strict=True)
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def find(store: Store, path: str, kind: Any) -> dict[str, Any] | None:
    """A document; None if it is missing, altered, or not of its kind."""
    value = store.find_json(path)
    return value if value is not None and fits(kind, value) else None


def read(store: Store, path: str, kind: Any) -> dict[str, Any]:
    """A document.

    Raises:
        BadData: it is missing, damaged, or not of its kind.
    """
    value = find(store, path, kind)
    if value is None:
        raise BadData(
            f"{store.at(path)} is missing, damaged or of another version of this program; "
            f"`notbugs verify --store {store.url}` says what else is, and the next run makes it again"
        )
    return value
