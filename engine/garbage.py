"""Keeping Python's garbage collector out of an engine's steps."""

from __future__ import annotations

import gc


def freeze() -> None:
    """Call it when a model is loaded: what is there now stays for good, and is scanned no more.

    Scanning a model's objects takes up to 0.3 s, a hundred steps of a small model, and would come again every some thousand requests.
    """
    gc.collect()
    gc.freeze()
    # Once more: the oldest generation is collected when a quarter as many objects are new as its last collection saw, which with
    # the model's among them would be never in a busy engine.
    gc.collect()
