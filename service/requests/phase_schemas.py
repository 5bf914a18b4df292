"""The fields of request bodies that divide a run into phases: `refiner`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_NAME = 200


class RefinerInput(BaseModel):
    """Another model that makes the last steps."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[
        str,
        Field(max_length=MAX_NAME, description="Name of a model with the same latents and noise schedule"),
    ]
    switch_at: Annotated[
        float, Field(gt=0, lt=1, description="The part of the steps after which it takes over")
    ] = 0.8
