"""The keys of all files together, and what happens when a file changes."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from service.keys import keys as module
from service.keys.keys import Keys
from service.keys.table import digest
from service.settings import SettingError, Settings


def entry(name: str, key: str, **fields: str) -> str:
    lines = (f"{field} = {value}\n" for field, value in fields.items())
    return f'[keys.{name}]\nsha256 = "{digest(key.encode()).hex()}"\n' + "".join(lines)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    contents = {
        "key_table": entry("alice", "key-of-alice") + entry("root", "key-of-root", admin="true"),
        "api_key_file": "plain-key-1\nplain-key-2\n",
        "admin_key_file": "plain-admin\n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    return {name: tmp_path / name for name in contents}


def keys_of(files: dict[str, Path], *names: str) -> Keys:
    return Keys(Settings(**{name: str(files[name]) for name in names}))


def name_of(keys: Keys, *credentials: str) -> str | None:
    client = keys.find(key.encode() for key in credentials)
    return client and client.name + (", admin" if client.admin else "")


def test_all_files_work_together(files):
    keys = keys_of(files, *files)
    found = [name_of(keys, key) for key in ("key-of-alice", "key-of-root", "plain-key-1", "plain-admin")]
    assert found == ["alice", "root, admin", "unnamed", "unnamed, admin"]
    assert name_of(keys, "another-key") is name_of(keys) is None
    assert name_of(keys, "another-key", "key-of-alice") == "alice"
    assert name_of(keys, "key-of-alice", "key-of-root") == "root, admin"
    assert keys.names == {"alice", "root", "unnamed"}


def test_each_plain_key_is_a_client_of_its_own(files):
    keys = keys_of(files, "api_key_file")
    first, second = (keys.find([key]) for key in (b"plain-key-1", b"plain-key-2"))
    assert first.id != second.id
    assert not first.may_see(second.id)
    assert b"plain-key-1" not in first.id.encode()


def test_without_a_key_everybody_is_admitted_where_there_are_none_or_only_those_of_admins(files):
    assert name_of(Keys(Settings())) == "anonymous, admin"
    assert name_of(keys_of(files, "admin_key_file")) == "anonymous"
    assert name_of(keys_of(files, "admin_key_file"), "plain-admin") == "unnamed, admin"
    assert name_of(keys_of(files, "admin_key_file", "api_key_file")) is None


def test_a_client_knows_whether_it_is_the_only_one(files):
    files["key_table"].write_text(entry("alice", "key-of-alice"))
    assert keys_of(files, "key_table").find([b"key-of-alice"]).alone
    assert not keys_of(files, "key_table", "api_key_file").find([b"key-of-alice"]).alone
    assert not keys_of(files, "admin_key_file").find([b"plain-admin"]).alone


def test_keys_are_added_and_revoked_without_a_restart(files):
    keys = keys_of(files, *files)
    assert not keys.refresh()
    files["key_table"].write_text(entry("bob", "key-of-bob"))
    files["api_key_file"].write_text("# none any more\n")
    assert keys.refresh()
    assert name_of(keys, "key-of-bob") == "bob"
    assert name_of(keys, "key-of-alice") is name_of(keys, "plain-key-1") is None
    assert keys.names == {"bob", "unnamed"}


def test_a_file_behind_a_link_that_is_replaced_is_noticed(files, tmp_path):
    """Kubernetes replaces the files of a mounted Secret so."""
    link = tmp_path / "link"
    link.symlink_to(files["key_table"])
    keys = Keys(Settings(key_table=str(link)))
    other = tmp_path / "other"
    other.write_text(entry("mabel", "key-of-mabel") + entry("root", "key-of-root", admin="true"))
    (tmp_path / "new").symlink_to(other)
    os.replace(tmp_path / "new", link)
    assert keys.refresh()
    assert name_of(keys, "key-of-mabel") == "mabel"


@pytest.mark.parametrize("content", ["[keys.a", None])
def test_a_file_that_breaks_leaves_the_keys_as_they_are(files, caplog, content):
    keys = keys_of(files, "key_table")
    if content is None:
        files["key_table"].unlink()
    else:
        files["key_table"].write_text(content)
    with caplog.at_level(logging.ERROR):
        assert not keys.refresh()
    assert "stay as they were" in caplog.text
    assert name_of(keys, "key-of-alice") == "alice"
    files["key_table"].write_text(entry("bob", "key-of-bob"))
    assert keys.refresh()
    assert name_of(keys, "key-of-alice") is None


def test_files_are_watched(files, monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    keys = keys_of(files, "key_table")

    async def scenario() -> set[str]:
        changed: asyncio.Queue[set[str]] = asyncio.Queue()
        watcher = asyncio.create_task(keys.watch(changed.put_nowait))
        files["key_table"].write_text(entry("bob", "key-of-bob"))
        names = await asyncio.wait_for(changed.get(), 30)
        watcher.cancel()
        return names

    assert asyncio.run(scenario()) == {"bob"}


def test_a_file_of_plain_keys_without_any_is_an_error_at_the_start(files):
    files["admin_key_file"].write_text("\n")
    with pytest.raises(SettingError, match="has no API keys"):
        keys_of(files, "admin_key_file")
