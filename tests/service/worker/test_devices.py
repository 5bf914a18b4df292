"""Which replicas the settings ask for."""

from __future__ import annotations

import pytest

from service.settings import SettingError, read_settings
from service.worker.devices import devices_of, settings_of_replicas


@pytest.mark.parametrize(
    ("device", "replicas", "found", "expected"),
    [
        ("auto", "auto", 8, ["auto"]),
        ("auto", "1", 8, ["auto"]),
        ("auto", "3", 0, ["cpu", "cpu", "cpu"]),
        ("auto", "2", 4, ["cuda:0", "cuda:1"]),
        ("cpu", "auto", 8, ["cpu"]),
        ("cpu", "2", 8, ["cpu", "cpu"]),
        ("cuda", "auto", 1, ["cuda"]),
        ("cuda", "auto", 3, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda", "2", 3, ["cuda:0", "cuda:1"]),
        ("cuda", "1", 3, ["cuda"]),
        ("cuda:2", "auto", 3, ["cuda:2"]),
        ("cuda:3,cuda:1", "auto", 4, ["cuda:3", "cuda:1"]),
        ("cuda:3,cuda:1", "2", 4, ["cuda:3", "cuda:1"]),
    ],
)
def test_each_replica_has_one_device(device, replicas, found, expected):
    settings = read_settings({}, {"device": device, "replicas": replicas})
    assert devices_of(settings, lambda: found) == expected


@pytest.mark.parametrize(
    ("device", "replicas", "found", "message"),
    [
        ("cuda", "auto", 0, "device is cuda, but there is no CUDA device"),
        ("cuda", "3", 2, "replicas is 3, but the number of CUDA devices is 2"),
        ("auto", "3", 2, "replicas is 3, but the number of CUDA devices is 2"),
        ("cuda:0,cuda:1", "3", 2, "replicas is 3, but device is cuda:0,cuda:1: one replica per device"),
        ("cuda:0", "2", 2, "replicas is 2, but device is cuda:0: one replica per device"),
    ],
)
def test_impossible_replicas_are_refused(device, replicas, found, message):
    settings = read_settings({}, {"device": device, "replicas": replicas})
    with pytest.raises(SettingError, match=f"^{message}$"):
        devices_of(settings, lambda: found)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "65", ""])
def test_a_wrong_number_of_replicas_is_refused(text):
    with pytest.raises(SettingError, match="--replicas is"):
        read_settings({}, {"replicas": text})


@pytest.mark.parametrize("text", ["cuda:0,cuda:0", "cpu,cpu", "cuda:0,cpu", "cuda:", "cuda:01", "gpu", ""])
def test_wrong_devices_are_refused(text):
    with pytest.raises(SettingError, match="--device is"):
        read_settings({}, {"device": text})


def test_a_worker_knows_its_device_and_the_number_of_replicas():
    each = settings_of_replicas(read_settings({}, {"device": "cuda:0, cuda:1"}))
    assert [(own.device, own.replica_count) for own in each] == [("cuda:0", 2), ("cuda:1", 2)]
