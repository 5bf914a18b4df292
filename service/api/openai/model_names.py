"""Model names of OpenAI clients: names of served models, the operator's aliases, and OpenAI's own names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from models.spec import ModelSpec
from service.errors import NotFound
from service.settings import SettingError, Settings

OPENAI_NAME = re.compile(r"(dall-e|gpt-image|chatgpt-image)-[\w.-]{1,100}")
GPT_IMAGE_NAME = re.compile(r"(gpt-image|chatgpt-image)-.*")  # their responses have no URLs


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
    """The served model for a client's model name and a task; None, the default model, for None and "".

    A name of OpenAI's own models selects the only model that supports the task. Raises NotFound.
    """
    if not name:
        return None
    if name in specs:
        return name
    if name in aliases:
        return aliases[name]
    supporting = [model for model, spec in specs.items() if task in spec.tasks]
    if OPENAI_NAME.fullmatch(name) and len(supporting) == 1:
        return supporting[0]
    names = ", ".join([*specs, *aliases])
    raise NotFound(f"model does not exist; expected one of {names}", param="model")


def list_names(specs: Mapping[str, ModelSpec], aliases: Mapping[str, str]) -> list[str]:
    """The names in GET /v1/models: all models except upscalers, and their aliases."""
    names = [name for name, spec in specs.items() if {*spec.tasks} - {"upscaling"}]
    return names + [alias for alias, model in aliases.items() if model in names]
