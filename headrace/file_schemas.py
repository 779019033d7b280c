"""Wire shapes of OpenAI's Files. This module knows no FastAPI and no SQL."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileOut(_Shape):
    """OpenAI's File object; times are whole Unix seconds."""

    id: str
    object: Literal["file"] = "file"
    bytes: int = Field(description="0 for a file of answers that is `uploaded`: they are being counted.")
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["uploaded", "processed"] = "processed"
    status_details: str | None = None


class FilePage(_Shape):
    """A page of files; the next one is `?after=<last_id>`."""

    object: Literal["list"] = "list"
    data: list[FileOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(_Shape):
    """What is left of a file."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
