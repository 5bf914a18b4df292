"""The repository's folder, and requirements that some tests have of the machine."""

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
