"""OpenAI's own client reads our batches: `pip install openai`, then `python examples/openai_client.py [URL]` against `headrace up`."""

import sys

import openai

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

with openai.OpenAI(base_url=f"{URL}/v1", api_key="unused") as client:
    print("models:", [model.id for model in client.models.list()])
    for batch in client.batches.list(limit=5):
        print(batch.id, batch.status, batch.request_counts, batch.usage.total_tokens if batch.usage else 0, "tokens")
