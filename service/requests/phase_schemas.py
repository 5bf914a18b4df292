"""The fields of request bodies that divide a run into phases: `refiner` and `hires`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from models.upscalers import UPSCALERS

MAX_NAME = 200
MAX_SIDE = 8192
MAX_TEXT = 4000


class RefinerInput(BaseModel):
    """Another model that makes the last steps."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[
        str,
        Field(max_length=MAX_NAME, description="Name of a model with the same latents and noise schedule"),
    ]
    switch_at: Annotated[
        float, Field(gt=0, lt=1, description="Fraction of the steps after which it takes over")
    ] = 0.8


class HiresInput(BaseModel):
    """A second pass at a larger size, from the enlarged image of the first."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    scale: Annotated[
        float, Field(ge=1, le=8, description="How many times as large as width x height the image becomes")
    ] = 2.0
    width: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_SIDE,
            description="Width of the finished image, instead of scale; other proportions are cropped",
        ),
    ] = None
    height: Annotated[
        int | None, Field(ge=1, le=MAX_SIDE, description="Height of the finished image; as width")
    ] = None
    strength: Annotated[
        float,
        Field(gt=0, le=1, description="How much the second pass changes: the fraction of its steps to run"),
    ] = 0.5
    steps: Annotated[
        int | None,
        Field(
            ge=1,
            le=1000,
            description="Steps of the second pass's schedule, of which it runs the fraction `strength`; "
            "default: as in the first",
        ),
    ] = None
    upscaler: Annotated[
        str,
        Field(
            max_length=MAX_NAME,
            description=f"How the first image is enlarged: {', '.join(UPSCALERS)} (those with latent in "
            "their names enlarge the latent), or an upscaling model, which runs with its defaults",
        ),
    ] = "latent"
    prompt: Annotated[
        str | None,
        Field(max_length=MAX_TEXT, description="Prompt of the second pass; default: that of the first"),
    ] = None
    negative_prompt: Annotated[
        str | None,
        Field(
            max_length=MAX_TEXT, description="Negative prompt of the second pass; default: that of the first"
        ),
    ] = None
