"""Model names of OpenAI clients: served models, aliases that the operator set, and OpenAI's own names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from models.spec import ModelSpec
from service.errors import NotFound
from service.settings import SettingError, Settings

OPENAI_NAME = re.compile(r"(dall-e|gpt-image|chatgpt-image)-[\w.-]{1,100}")
GPT_IMAGE_NAME = re.compile(r"(gpt-image|chatgpt-image)-.*")  # their responses hold base64 alone


def aliases_of(settings: Settings) -> dict[str, str]:
    """Alias -> model."""
    return dict(entry.split("=", 1) for entry in settings.alias)


def check_aliases(settings: Settings, models: Collection[str]) -> None:
    """Raise SettingError for an alias of a model that is not served."""
    for alias, model in aliases_of(settings).items():
        if model not in models:
            expected = f"expected one of {', '.join(models)}"
            raise SettingError(f"alias {alias} names the model {model}, which is not served; {expected}")


def find_served_name(
    name: str | None, task: str, specs: Mapping[str, ModelSpec], aliases: Mapping[str, str]
) -> str | None:
    """The served model that a client's name means for a task; None, as the name, means the default.

    A name of OpenAI's own models means the one model with that task. Raises NotFound.
    """
    if name is None or name in specs:
        return name
    if name in aliases:
        return aliases[name]
    able = [model for model, spec in specs.items() if task in spec.tasks]
    if OPENAI_NAME.fullmatch(name) and len(able) == 1:
        return able[0]
    known = ", ".join([*specs, *aliases])
    raise NotFound(f"model does not exist; expected one of {known}", param="model")


def list_names(specs: Mapping[str, ModelSpec], aliases: Mapping[str, str]) -> list[str]:
    """The names that GET /v1/models shows: models that do more than upscale, and their aliases."""
    able = [name for name, spec in specs.items() if {*spec.tasks} - {"upscaling"}]
    return able + [alias for alias, model in aliases.items() if model in able]
