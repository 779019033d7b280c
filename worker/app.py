"""The Celery app of a worker: `celery -A worker.app worker -P threads`, and `celery -A worker.app flower`.

Importing this module loads neither torch nor a model: Flower and `celery inspect` import it too.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import signals

from headrace import log
from headrace.broker import make_celery
from headrace.settings import get_settings
from worker import lifecycle, tasks

app = make_celery(get_settings())
tasks.register(app, lifecycle.runtime_of)
lifecycle.install(app, get_settings())


@signals.setup_logging.connect
def configure_logging(**_: Any) -> None:
    """Log as every headrace process does; a receiver here keeps Celery from setting up the root logger."""
    log.configure(get_settings().log_level)
    for name in ("celery", "kombu"):
        # What Celery says of each task, headrace says in its own words; its warnings are the connection's and are wanted.
        logging.getLogger(name).handlers = list(logging.getLogger("worker").handlers)
        logging.getLogger(name).setLevel(logging.WARNING)
