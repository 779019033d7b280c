"""In this process, no server: `python examples/pipeline.py [MODEL]`. Several prompts, one of them bad, with a stream at the end."""

import sys

from headrace import GenerationConfig, pipeline

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
PROMPTS = [
    "Name three rivers in Europe.",
    [{"role": "system", "content": "You answer in one short sentence."}, {"role": "user", "content": "What is a headrace?"}],
    [{"role": "robot", "content": "This role does not exist, so this prompt fails, and only this one."}],
]

with pipeline(MODEL) as pipe:
    for response in pipe(PROMPTS, gen_config=GenerationConfig(max_new_tokens=48)):
        print(f"[{response.index}]", response.error_message or response.text)
    for piece in pipe.stream_infer(["Count from one to five."], gen_config=GenerationConfig(max_new_tokens=24)):
        print(piece.text, end="", flush=True)
    print()
