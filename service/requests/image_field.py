"""The type of image fields in request bodies."""

from __future__ import annotations

from typing import Annotated

from PIL import Image
from pydantic import GetCoreSchemaHandler, ValidatorFunctionWrapHandler
from pydantic_core import CoreSchema, core_schema

from service.requests.images import ImageSource

IMAGE = "A PNG, JPEG or WebP file in base64 or as a data: URL"


class _ImageSourceSchema:
    """An image is text in the API; inside the service it may also be the bytes of a file, or pixels."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self.validate, core_schema.str_schema(strict=True))

    @staticmethod
    def validate(value: object, read_text: ValidatorFunctionWrapHandler) -> object:
        return value if isinstance(value, bytes | Image.Image) else read_text(value)


ImageInput = Annotated[ImageSource, _ImageSourceSchema()]
