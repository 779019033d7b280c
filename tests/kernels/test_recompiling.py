"""Steps of any size run on the binaries of the first one: a kernel compiled in the middle of a batch holds all of it up for seconds."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has replaced the compiler in this process", allow_module_level=True)

from kernel_launches import recorded, specialised
from step_launches import STEPS, launches_of_a_step


def test_no_step_needs_another_binary_than_the_one_before() -> None:
    found: defaultdict[str, list[object]] = defaultdict(list)
    for step in STEPS:
        with recorded() as launches:
            launches_of_a_step(*step)
        for launch in launches:
            if (key := specialised(launch)) not in found[launch.name]:
                found[launch.name].append(key)
    assert set(found) >= {"_prefill_kernel", "_decode_kernel", "_plan_kernel", "_rotary_kernel", "_sample_kernel"}
    assert {name: len(keys) for name, keys in found.items()} == dict.fromkeys(found, 1)
