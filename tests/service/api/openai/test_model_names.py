"""Model names: served models, aliases and names of OpenAI."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from service.api.openai.model_names import check_aliases, find_served_name, list_names
from service.errors import NotFound
from service.settings import SettingError, Settings

TEXT, BOTH, UPSCALE = ("text-to-image",), ("text-to-image", "inpainting"), ("upscaling",)


def specs(**tasks: tuple[str, ...]) -> dict[str, SimpleNamespace]:
    return {name: SimpleNamespace(tasks=of) for name, of in tasks.items()}


def test_an_alias_comes_before_the_rule_for_names_of_openai():
    served = specs(a=TEXT, b=TEXT)
    assert find_served_name("dall-e-3", "text-to-image", served, {"dall-e-3": "b"}) == "b"
    assert find_served_name("a", "text-to-image", served, {"a": "b"}) == "a"  # a served model is itself
    assert find_served_name(None, "text-to-image", served, {}) is None
    assert find_served_name("", "text-to-image", served, {}) is None


def test_a_name_of_openai_depends_on_the_task():
    served = specs(a=TEXT, b=BOTH, c=UPSCALE)
    assert find_served_name("dall-e-2", "inpainting", served, {}) == "b"
    with pytest.raises(NotFound, match="expected one of a, b, c, x"):
        find_served_name("dall-e-2", "text-to-image", served, {"x": "a"})


@pytest.mark.parametrize("name", ["sdxl", "dall-e", "DALL-E-3", "dall-e-3\n", "gpt-4o"])
def test_other_names_are_unknown(name):
    with pytest.raises(NotFound):
        find_served_name(name, "text-to-image", specs(a=TEXT), {})


def test_aliases_of_models_that_generate_are_listed():
    served = specs(a=TEXT, c=UPSCALE)
    assert list_names(served, {"x": "a", "y": "c"}) == ["a", "x"]


def test_an_alias_of_an_unknown_model_is_a_setting_error():
    check_aliases(Settings(alias=("dall-e-3=a",)), ["a"])
    with pytest.raises(SettingError, match="names the model b, which is not served; expected one of a"):
        check_aliases(Settings(alias=("dall-e-3=b",)), ["a"])
