"""Against a running service (`headrace up`): `python examples/submit_and_poll.py [URL]`. Submit, wait, read in order."""

import sys

from headrace import Client, GenerationConfig

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
PROMPTS = [f"Write one sentence about the number {n}." for n in range(20)]

with Client(URL) as client:
    batch = client.submit(PROMPTS, GenerationConfig(max_new_tokens=24), metadata={"source": "examples/submit_and_poll.py"})
    print("submitted", batch.id)
    batch = client.wait(batch.id, lambda now: print(now.status, now.counts.done, "of", now.counts.total))
    for completion in client.results(batch.id):
        print(f"[{completion.index}]", completion.error.message if completion.error else completion.choices[0].text)
    print(batch.usage)
