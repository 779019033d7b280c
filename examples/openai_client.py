"""OpenAI's own client, unmodified: `pip install openai`, then `python examples/openai_client.py [URL]` against `headrace up`.

A file of requests goes up, a batch of it is made, and its answers and errors come back as two files.
"""

import json
import sys
import time

import openai

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
ENDPOINT = "/v1/chat/completions"
QUESTIONS = {"capital": "What is the capital of France?", "sea": "In one sentence, why is the sea salty?"}

with openai.OpenAI(base_url=f"{URL}/v1", api_key="unused") as client:
    model = client.models.list().data[0].id
    requests = []
    for custom_id, question in QUESTIONS.items():
        body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 32, "temperature": 0}
        requests.append({"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body})
    lines = "\n".join(json.dumps(request) for request in requests)

    file = client.files.create(file=("requests.jsonl", lines.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
    while batch.status in ("validating", "in_progress", "finalizing"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    print(batch.id, batch.status, batch.request_counts)

    if batch.output_file_id:
        for line in client.files.content(batch.output_file_id).text.splitlines():
            answer = json.loads(line)
            print(answer["custom_id"], answer["response"]["body"]["choices"][0]["message"]["content"])
    if batch.error_file_id:
        print(client.files.content(batch.error_file_id).text)
