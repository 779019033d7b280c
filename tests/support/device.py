"""The device that the tests of whole engines run on: HEADRACE_TEST_DEVICE=cuda puts them on a GPU, where none runs by itself."""

from __future__ import annotations

import os

DEVICE = os.environ.get("HEADRACE_TEST_DEVICE", "cpu")
