"""The fields `controls` and `reference_images` of request bodies."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from service.engine.job import ControlMode
from service.requests.image_field import IMAGE, ImageInput
from service.requests.preprocessing import HIGH, LOW, Preprocessor, refusal

MAX_CONTROLS = 8
MAX_REFERENCES = 20
MAX_SCALE = 2.0
MAX_NAME = 200


def known_or_refused(value: object, read: ValidatorFunctionWrapHandler) -> object:
    try:
        return read(value)
    except ValidationError:
        raise ValueError(refusal(value if isinstance(value, str) else "")) from None


PreprocessorInput = Annotated[Preprocessor, WrapValidator(known_or_refused)]
PREPROCESS = (
    "How `image` becomes the control image: canny finds edges; invert turns black lines on white into white "
    "lines on black; threshold makes bright pixels white and all others black; blur "
    "smooths it; none: `image` is one already"
)
Scale = Annotated[float, Field(ge=0, le=MAX_SCALE)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Threshold = Annotated[int, Field(ge=0, le=255)]


class ThresholdFields(BaseModel):
    """The thresholds of canny."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    low: Annotated[Threshold, Field(description="canny only: gradients below this are not edges")] = LOW
    high: Annotated[Threshold, Field(description="canny only: gradients above this are always edges")] = HIGH


class ControlSettings(ThresholdFields):
    """How a control acts, without its image."""

    model: Annotated[
        str, Field(max_length=MAX_NAME, description="Name of a ControlNet or T2I-Adapter; see GET /models")
    ]
    scale: Annotated[Scale, Field(description="Factor of everything that the control adds to the UNet")] = 1.0
    start: Annotated[
        Fraction, Field(description="Fraction of the run at which the control begins to act")
    ] = 0.0
    end: Annotated[Fraction, Field(description="Fraction of the run at which it ends")] = 1.0
    preprocess: Annotated[PreprocessorInput, Field(description=PREPROCESS)] = "none"
    mode: Annotated[
        ControlMode,
        Field(
            description="balanced: the control acts on both predictions of classifier-free guidance; prompt: "
            "also, weaker in the UNet's outer layers, so that the prompt has more weight; control: weaker in "
            "the outer layers and on the conditional prediction alone"
        ),
    ] = "balanced"
    type: Annotated[
        str | None,
        Field(
            max_length=MAX_NAME,
            description="Kind of the control image, required by a ControlNet for several kinds",
        ),
    ] = None


class ControlInput(ControlSettings):
    """A control image, and the ControlNet or T2I-Adapter that reads it."""

    image: Annotated[
        ImageInput | None,
        Field(
            description=f"{IMAGE}; scaled to cover the size of the generated image, then cropped to it. "
            "Optional in POST /inpaint: default is the request's image"
        ),
    ] = None


class ReferenceSettings(BaseModel):
    """How a reference image acts, without the image."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    adapter: Annotated[
        str,
        Field(
            max_length=MAX_NAME,
            description="Name of an IP-Adapter, or neighbours, with which a retrieval-augmented model reads "
            "the image beside the prompt; see GET /models",
        ),
    ]
    scale: Annotated[Scale, Field(description="Weight of the image next to the prompt")] = 1.0
    start: Annotated[Fraction, Field(description="Fraction of the run at which the image begins to act")] = (
        0.0
    )
    end: Annotated[Fraction, Field(description="Fraction of the run at which it ends")] = 1.0


class ReferenceInput(ReferenceSettings):
    """An image whose content or style the generated image follows, and the adapter that reads it."""

    image: Annotated[ImageInput, Field(description=f"{IMAGE}; its centre square is used")]


class PreprocessRequest(ThresholdFields):
    """An image to turn into a control image."""

    image: Annotated[ImageInput, Field(description=IMAGE)]
    preprocess: Annotated[PreprocessorInput, Field(description=PREPROCESS)]


class PreprocessResponse(BaseModel):
    """A control image."""

    data: Annotated[str, Field(description="A PNG file in base64")]
    media_type: str
    width: int
    height: int
