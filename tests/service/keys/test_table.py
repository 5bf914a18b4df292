"""The key table: what an entry means, and which files are refused."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from service.keys.client import KeyLimits
from service.keys.table import digest, new_key, read_table, to_toml
from service.settings import SettingError

HASH = hashlib.sha256(b"the-key-of-alice").hexdigest()
OTHER = hashlib.sha256(b"another-key").hexdigest()


def write(folder: Path, text: str) -> Path:
    file = folder / "keys.toml"
    file.write_text(text)
    return file


def test_an_entry_has_a_hash_limits_and_rights(tmp_path):
    text = f"""
    [keys.alice]
    sha256 = "{HASH}"
    requests_per_minute = 60
    images_per_hour = 500
    running_jobs = 4
    share = 2
    admin = true

    [keys.bob]
    sha256 = ["{OTHER}", "{"0" * 64}"]  # a key and its successor
    """
    alice, bob, successor = read_table(write(tmp_path, text))
    assert alice[0] == digest(b"the-key-of-alice")
    assert (alice[1].name, alice[1].admin, alice[1].share) == ("alice", True, 2.0)
    assert alice[1].limits == KeyLimits(60, 500, 4)
    assert bob[1] == successor[1]
    assert (bob[1].admin, bob[1].share, bob[1].limits) == (False, 1.0, KeyLimits())
    assert bob[1].id != alice[1].id


def test_a_hash_is_what_sha256sum_prints(tmp_path):
    printed = subprocess.run(["sha256sum"], input=b"the-key-of-alice", capture_output=True, check=True).stdout
    ((own, _),) = read_table(write(tmp_path, f'[keys.a]\nsha256 = "{printed.split()[0].decode()}"'))
    assert own == digest(b"the-key-of-alice")


def test_a_table_without_entries_lets_nobody_in(tmp_path):
    assert read_table(write(tmp_path, "")) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("[keys.a", "not a TOML file"),
        ("[alice]\nsha256 = ''", r"\[keys.NAME\]"),
        ("keys = 3", r"\[keys.NAME\]"),
        ("[keys]\na = 3", "keys.a"),
        ("[keys.a]", "keys.a.sha256: field required"),
        ("[keys.a]\nsha256 = 'the-key-itself'", "keys.a.sha256: expected the key's SHA-256"),
        ("[keys.a]\nsha256 = []", "keys.a.sha256: expected the key's SHA-256"),
        (f"[keys.a]\nsha256 = '{HASH}'\nimages = 3", "keys.a.images: is not a field"),
        (f"[keys.a]\nsha256 = '{HASH}'\nrunning_jobs = 0", "keys.a.running_jobs: input should be greater"),
        (f"[keys.a]\nsha256 = '{HASH}'\nrunning_jobs = '4'", "keys.a.running_jobs"),
        (f"[keys.a]\nsha256 = '{HASH}'\nadmin = 1", "keys.a.admin"),
        (f"[keys.a]\nsha256 = '{HASH}'\nshare = nan", "keys.a.share"),
        (f"[keys.'a b']\nsha256 = '{HASH}'", "the name 'a b' is not possible"),
        (f"[keys.unnamed]\nsha256 = '{HASH}'", "the name 'unnamed' is not possible"),
        (f"[keys.a]\nsha256 = '{HASH}'\n[keys.b]\nsha256 = '{HASH.upper()}'", "the same hash"),
    ],
)
def test_a_wrong_table_is_refused_by_name_without_showing_what_may_be_a_key(tmp_path, text, message):
    file = tmp_path / "keys.toml" if text is None else write(tmp_path, text)
    with pytest.raises(SettingError, match=message) as error:
        read_table(file)
    assert "the-key-itself" not in str(error.value)


def test_a_new_entry_is_read_back(tmp_path):
    key = new_key()
    fields = {"requests_per_minute": 5, "images_per_hour": None, "share": 0.5, "admin": True}
    ((own, client),) = read_table(write(tmp_path, to_toml("new-key", digest(key.encode()), fields)))
    assert own == digest(key.encode())
    assert (client.name, client.admin, client.share) == ("new-key", True, 0.5)
    assert client.limits == KeyLimits(requests_per_minute=5)
    assert len(key) > 40
    assert new_key() != key
