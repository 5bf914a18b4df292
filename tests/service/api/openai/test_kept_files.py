"""Files behind URLs: how many are kept, and for how long."""

from __future__ import annotations

import asyncio

import pytest

from service.api.openai.kept_files import KeptFiles
from service.errors import NotFound
from service.settings import Settings


def test_the_oldest_files_make_room_and_every_file_expires():
    async def scenario() -> None:
        files = KeptFiles(Settings(jobs_kept=2, jobs_bytes=10, jobs_seconds=0.1))
        first, second, third = (files.keep(bytes(4), "png") for _ in range(3))
        assert is_kept(files, second)
        assert is_kept(files, third)
        assert not is_kept(files, first)
        large = files.keep(bytes(11), "webp")  # over the limit, but the newest
        assert files.find(large).media_type == "image/webp"
        assert not is_kept(files, third)
        await asyncio.sleep(0.15)
        assert not is_kept(files, large)

    asyncio.run(scenario())


def is_kept(files: KeptFiles, name: str) -> bool:
    try:
        files.find(name)
    except NotFound:
        return False
    return True


def test_names_differ_and_cannot_be_guessed():
    async def names() -> set[str]:
        files = KeptFiles(Settings())
        return {files.keep(b"", "jpeg") for _ in range(10)}

    made = asyncio.run(names())
    assert len(made) == 10
    assert all(len(name) == len("img-") + 48 + len(".jpg") for name in made)


def test_an_unknown_name_is_not_found():
    with pytest.raises(NotFound, match="limited time"):
        KeptFiles(Settings()).find("../settings.py")
