"""Settings from flags, the environment and a file, and messages about wrong ones."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

import pytest

from service.cli.options import settings_of
from service.settings import SettingError, Settings, misspelled, read_settings, to_environment


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "ldm.toml"
    file.write_text(
        'model = ["a", "b"]\nport = 1\nqueue_size = 2\ninvariant = true\nbuckets = [2, 8]\ntimeout = 1.5\n'
        'step_memory = "2G"\ndevice = "cpu"\n'
    )
    return file


def test_a_file_has_settings_by_their_names(config):
    settings = read_settings({}, config=str(config))
    assert settings == replace(
        Settings(), model=("a", "b"), port=1, queue_size=2, invariant=True, buckets=(2, 8), timeout=1.5,
        step_memory=2**31, device="cpu",
    )  # fmt: skip
    assert read_settings({"LDM_CONFIG": str(config)}) == settings


def test_flags_come_before_the_environment_before_the_file_before_defaults(config):
    environ = {"LDM_CONFIG": str(config), "LDM_PORT": "3", "LDM_QUEUE_SIZE": "4"}
    settings = read_settings(environ, flags={"queue_size": "5"})
    assert (settings.queue_size, settings.port, settings.device, settings.dtype) == (5, 3, "cpu", "auto")
    other = config.with_name("other.toml")
    other.write_text("port = 9")
    assert read_settings({"LDM_CONFIG": str(config)}, config=str(other)).device == "auto"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('port = "x"', ("port is 'x'", "FILE", "a whole number from 0 to 65535")),
        ("port = 80.5", ("port is '80.5'", "FILE", "a whole number")),
        ("invariant = 3", ("invariant is '3'", "FILE", "true or false")),
        ("ports = 1", ("ports in FILE is not a setting", "did you mean port?")),
        ("[server]\nport = 1", ("server in FILE is not a setting",)),
        ("host = {a = 1}", ("host in FILE is a table",)),
        ("port = ", ("FILE is not a TOML file",)),
    ],
)
def test_errors_in_a_file_name_the_key_the_value_and_the_file(tmp_path, line, named):
    file = tmp_path / "ldm.toml"
    file.write_text(line)
    with pytest.raises(SettingError) as error:
        read_settings({}, config=str(file))
    for part in named:
        assert part.replace("FILE", str(file)) in str(error.value)


def test_errors_elsewhere_name_their_source():
    with pytest.raises(SettingError) as error:
        read_settings({"LDM_DTYPE": "int8"})
    expected = "one of auto, float16, bfloat16, float32"
    assert str(error.value) == f"LDM_DTYPE is 'int8' (from the environment); expected {expected}"
    with pytest.raises(SettingError, match=r"--queue-size is ''.*the command line"):
        read_settings({}, flags={"queue_size": ""})
    with pytest.raises(SettingError, match=r"nowhere.toml cannot be read: No such file"):
        read_settings({}, config="nowhere.toml")


def test_api_keys_are_never_shown():
    with pytest.raises(SettingError, match="LDM_API_KEYS") as error:
        read_settings({"LDM_API_KEYS": "long-enough,short"})
    assert "short" not in str(error.value)
    assert "long-enough" not in repr(read_settings({"LDM_API_KEYS": "long-enough"}))
    with pytest.raises(SettingError):
        read_settings({"LDM_API_KEYS": ""})  # an empty value must not disable authentication


def test_a_misspelled_variable_gives_a_warning():
    environ = {"LDM_QUEUESIZE": "1", "LDM_PORT": "1", "LDM_CONFIG": "c", "LDM_PORT_8000_TCP_ADDR": "x"}
    assert misspelled(environ) == ["LDM_QUEUESIZE is not a setting; did you mean LDM_QUEUE_SIZE?"]


def test_a_child_process_gets_the_same_settings_without_api_keys(config):
    environ = {"LDM_CONFIG": str(config), "LDM_API_KEYS": "long-enough", "HOME": "/home"}
    settings = replace(read_settings(environ), faults="step:oom:word:1")
    passed = to_environment(settings, environ)
    assert passed["HOME"] == "/home"
    assert not any("long-enough" in value for value in passed.values())
    assert read_settings(passed) == replace(settings, api_keys=())


def test_every_setting_can_be_read_back():
    for one in fields(Settings):
        assert one.metadata["parser"].expected
    assert read_settings(to_environment(Settings(), {})) == Settings()


def test_paths_with_commas(tmp_path):
    settings = read_settings({"LDM_MODEL": 'emoji, "/w/a, b.safetensors"'})
    assert settings.model == ("emoji", "/w/a, b.safetensors")
    assert read_settings(to_environment(settings, {})).model == settings.model
    (file := tmp_path / "c,d.safetensors").touch()
    flags = argparse.Namespace(model=["emoji", str(file)], lora=[f"a={file}", "b=x,c=y"], config=None)
    found = settings_of(flags, "model", "lora")
    assert found.model == ("emoji", str(file))
    assert found.lora == (f"a={file}", "b=x", "c=y")
