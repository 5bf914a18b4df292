"""Where the repository lies, and what a machine must have for some tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.training.scenes import FONT

ROOT = Path(__file__).resolve().parents[2]
needs_font = pytest.mark.skipif(
    not FONT.exists() and not os.environ.get("LDM_TESTS_MUST_NOT_SKIP"),
    reason="fonts-noto-color-emoji is not installed",
)
