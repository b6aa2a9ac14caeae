"""The type of a number that counts, where a file says it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""An integer from 0 on. A checkpoint whose state holds another is refused."""
