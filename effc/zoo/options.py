"""Settings of a task's model, as somebody gave them: an unknown or impossible one is named."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from effc.errors import SourceError

T = TypeVar("T")


def read(kind: type[T], given: Any, task: str) -> T:
    """Settings of a dataclass. Raises SourceError, with the setting that is wrong."""
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, known = ".".join(map(str, first["loc"])), fields(cast(Any, kind))
        raise SourceError(
            f"settings of {task}: {place}: {first['msg'].lower()}",
            hint=f"they are {', '.join(f.name for f in known)}",
        ) from error
