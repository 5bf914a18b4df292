"""`ldm keys new`."""

from __future__ import annotations

import pytest

from service.cli.main import main
from service.keys.keys import Keys
from service.settings import Settings


def test_a_new_key_opens_the_service_that_has_its_entry(tmp_path, capsys):
    table = tmp_path / "keys.toml"
    shown = []
    for name, flags in (("alice", ["--admin"]), ("bob", ["--running-jobs", "2", "--share", "0.5"])):
        assert main(["keys", "new", name, *flags]) == 0
        out, err = capsys.readouterr()
        shown.append(err.split()[-1])
        assert shown[-1] not in out
        with table.open("a") as file:
            file.write(out)
    keys = Keys(Settings(key_table=str(table)))
    alice, bob = (keys.find([key.encode()]) for key in shown)
    assert (alice.name, alice.admin) == ("alice", True)
    assert (bob.name, bob.admin, bob.share, bob.limits.running_jobs) == ("bob", False, 0.5, 2)


@pytest.mark.parametrize("arguments", [["a b"], ["a", "--images-per-hour", "0"], ["a", "--share", "nan"]])
def test_a_wrong_argument_gives_no_entry(capsys, arguments):
    assert main(["keys", "new", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ldm: ")
