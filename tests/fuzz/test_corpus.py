"""Every input that the fuzzer kept, and every one that was a fault once, raises no unexpected error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, run

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_raises_only_documented_errors(name):
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for file in inputs:
        run(name, file.read_bytes())


def test_another_error_is_raised(monkeypatch):
    monkeypatch.setattr("models.conditioning.prompts.parse", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("prompt", b"a prompt")
