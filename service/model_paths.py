"""From the names and paths given at start-up (--model, --lora, --vae, --embedding) to files. No torch.

Names in requests never reach this module: they are looked up among the models given at start-up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from models.errors import CheckpointError
from models.formats import companions
from models.formats.adapter_files import in_folder
from models.formats.averages import WeightChoice
from models.formats.identify import Source, identify, is_checkpoint, with_vae
from models.formats.safetensors import is_safetensors
from models.formats.single_file import model_name
from models.spec import Prediction

TINY_VAE = "tiny VAE"
BUNDLED = ("emoji", "emoji-upscale")  # the models that come with the package
BUNDLED_CONTROLS = ("emoji-outline",)  # the ControlNets that come with the package, for the model emoji
BUNDLED_LORAS = ("emoji-few-steps",)  # the LoRAs, for the same model
LORA_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # looked for in a LoRA folder


class ModelPathError(ValueError):
    """A model or an adapter given at start-up does not exist, or two have the same name."""


def locate(
    name: str, allow_pickle: bool = False, found: Mapping[str, Path] = MappingProxyType({})
) -> tuple[str, Path]:
    """(name, path) of a model given at start-up: a bundled model, a folder, or a single file.

    found: models in the folders of --model-dir, which may be given by name too. A folder is named after its
    last path component (a symbolic link after the link), a file after its stem.
    Raises ModelPathError, also for a pickle file unless pickles are allowed.
    """
    path = bundled(name) if name in BUNDLED else absolute(name)
    if name in found and not (path and path.exists()):
        return name, found[name]
    if path is not None and path.is_file():
        if not is_safetensors(path) and not allow_pickle:
            raise ModelPathError(f"{name!r} is not a .safetensors file; pickled weights need --allow-pickle")
        return model_name(path), path
    if path and path.is_dir() and not is_checkpoint(path) and (adapter := in_folder(path)):
        raise ModelPathError(adapter.usage)
    if path is None or not is_checkpoint(path):
        bundled_names = " or ".join(map(repr, BUNDLED))
        raise ModelPathError(
            f"no model at {name!r}: expected {bundled_names}, a folder with a model_index.json, "
            "a .safetensors file or a .ckpt file, or the name of a model in --model-dir"
        )
    return path.name, path


def locate_all(
    names: Iterable[str], allow_pickle: bool = False, found: Mapping[str, Path] = MappingProxyType({})
) -> dict[str, Path]:
    """locate() for each; raises ModelPathError also when two different models have the same name."""
    given: dict[str, Path] = {}
    for name, path in (locate(name, allow_pickle, found) for name in names):
        if given.setdefault(name, path) != path:
            raise ModelPathError(f"two models are called {name!r}; rename one of them")
    return given


def locate_folders(paths: Iterable[str]) -> tuple[Path, ...]:
    """The folders given with --model-dir or --lora-dir. Raises ModelPathError."""
    folders = tuple(map(absolute, paths))
    for text, folder in zip(paths, folders, strict=True):
        if not folder.is_dir():
            raise ModelPathError(f"no folder at {text!r}")
    return folders


def locate_loras(arguments: Iterable[str]) -> dict[str, Path]:
    """LoRA name -> file, from NAME=PATH; PATH may be a folder that holds the file, or a bundled LoRA.

    Raises ModelPathError.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        folder = bundled(text) if text in BUNDLED_LORAS else None
        if (file := adapter_file(folder or Path(text))) is None:
            raise ModelPathError(f"no LoRA at {text!r}: expected a file, or a folder with {LORA_FILES[0]}")
        if name in found:
            raise ModelPathError(f"two LoRAs are called {name!r}; rename one of them")
        found[name] = absolute(file)
    return found


def adapter_file(path: Path) -> Path | None:
    """The file of a LoRA or an embedding: the path itself, or the LoRA in a folder; None if there is none."""
    candidates = (*(path / name for name in LORA_FILES), path)
    return next((file for file in candidates if file.is_file()), None)


def locate_vaes(arguments: Iterable[str], models: Collection[str], what: str = "VAE") -> dict[str, Path]:
    """Model name -> path of a VAE for it, from MODEL=PATH, or PATH if there is one model.

    what: kind of VAE, for errors. Raises ModelPathError.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        model, _, text = argument.partition("=")
        if model not in models:
            model, text = next(iter(models), ""), argument
            if len(models) != 1:
                raise ModelPathError(
                    f"the {what} {argument!r} names no model: expected MODEL=PATH, with MODEL one of "
                    f"{', '.join(models)}"
                )
        path = located_network(text, what)
        if model in found:
            raise ModelPathError(f"two {what}s are given for {model!r}")
        found[model] = path
    return found


def locate_embeddings(arguments: Iterable[str]) -> dict[str, Path]:
    """Embedding name -> file, from NAME=PATH.

    Raises ModelPathError, also for two names that differ in case only.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        if not Path(text).is_file():
            raise ModelPathError(f"no embedding at {text!r}: expected a file")
        if name.lower() in map(str.lower, found):
            raise ModelPathError(f"two embeddings are called {name!r}; rename one of them")
        found[name] = absolute(text)
    return found


def locate_controls(arguments: Iterable[str]) -> dict[str, Path]:
    """Name -> path of controls, from NAME=PATH: a file, a folder with a config.json, or a bundled ControlNet.

    Raises ModelPathError.
    """

    def locate_control(text: str) -> Path:
        path = bundled(text) if text in BUNDLED_CONTROLS else None
        return path or located_network(text, "ControlNet")

    return locate_named(arguments, "ControlNet", locate_control)


def locate_references(arguments: Iterable[str]) -> dict[str, Path]:
    """Name -> file of reference adapters, from NAME=PATH. Raises ModelPathError."""

    def locate_file(text: str) -> Path:
        if not Path(text).is_file():
            raise ModelPathError(f"no reference adapter at {text!r}: expected a file")
        return absolute(text)

    return locate_named(arguments, "reference adapter", locate_file)


def locate_named(arguments: Iterable[str], what: str, locate_one: Callable[[str], Path]) -> dict[str, Path]:
    """Name -> path, from NAME=PATH. what: the word for one of them. Raises ModelPathError."""
    found: dict[str, Path] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        path = locate_one(text)
        if name in found:
            raise ModelPathError(f"two {what}s are called {name!r}; rename one of them")
        found[name] = path
    return found


def located_network(text: str, what: str) -> Path:
    """The absolute path of a network: a file, or a folder with a config.json. Raises ModelPathError."""
    path = Path(text)
    if not (path.is_file() or (path / "config.json").is_file()):
        raise ModelPathError(f"no {what} at {text!r}: expected a file, or a folder with a config.json")
    return absolute(path)


def bundled(name: str) -> Path | None:
    """The folder of a bundled model; None if the package was installed without them."""
    try:
        return Path(str(resources.files("weights") / name))
    except ModuleNotFoundError:
        return None


def absolute(path: str | Path) -> Path:
    """The absolute path. Symbolic links are not resolved: the link's own name and suffix count."""
    return Path(os.path.abspath(path))


def identify_all(
    paths: Mapping[str, Path | Source],
    allow_pickle: bool = False,
    prediction: Prediction | None = None,
    weights: WeightChoice = "auto",
    vaes: Mapping[str, Path] = MappingProxyType({}),
) -> dict[str, Source]:
    """Identify the checkpoint of each model, without reading its weights; arguments as for identify().

    vaes: for models whose file has none; see locate_vaes(). The models get the names given here. A path may
    already be an identified Source. Raises CheckpointError, also for a model that cannot generate images.
    """
    sources = {}
    for name, path in paths.items():
        source = path if isinstance(path, Source) else identify(path, allow_pickle, prediction, weights)
        if source.spec.unet is None:
            raise CheckpointError(f"{name} is a VAE alone: add it to a model with --vae")
        if source.spec.lacks_text_encoder:
            raise CheckpointError(f"{name}: {companions.TEXT_ENCODER_MISSING}")
        if source.lacks_vae:
            if name not in vaes:
                raise CheckpointError(f"{name} {companions.VAE_MISSING}")
            source = with_vae(source, vaes[name])
        sources[name] = replace(source, spec=replace(source.spec, name=name))
    return sources
