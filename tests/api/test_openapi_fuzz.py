"""The API against its own OpenAPI document: whatever a client makes of it, no answer is a 5xx or one that the document doesn't name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live_api import LiveApi, work

from headrace.store import Store

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,response_headers_conformance"


@pytest.mark.slow
def test_nothing_that_the_document_allows_or_forbids_breaks_the_service(
    api: LiveApi, http: httpx.Client, store: Store, tmp_path: Path
) -> None:
    """Schemathesis makes valid and invalid requests of every operation, one by one and in sequences along ids that replies hold."""
    upload = {"file": ("requests.jsonl", b'{"custom_id": "1"}\n'), "purpose": (None, "batch")}
    assert http.post("/v1/files", files=upload).status_code == 200
    for size in (1, 30):
        assert http.post("/v1/batches", json={"prompts": ["a"] * size}).status_code == 202
    work(store, only=[0])
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{api.url}/openapi.json"),
        *("--checks", CHECKS, "--max-examples", "40", "--max-time", "25", "--seed", "1", "--no-color", "--warnings", "off"),
        # /readyz says 503 in this test, as it should: there is no worker.
        *("--exclude-path", "/readyz"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert http.get("/v1/batches").status_code == 200
