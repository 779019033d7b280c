"""The five programs of the pipeline document, word for word; only their import line names headrace."""

from __future__ import annotations

IMPORTS = "from headrace import pipeline, GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig\n"
SAMPLING = "gen_config = GenerationConfig(top_p=0.8,\n                              top_k=40,\n                              temperature=0.8,\n                              max_new_tokens=1024)\n"
TP2 = "backend_config = TurbomindEngineConfig(tp=2)\n"
PIPE = "pipe = pipeline('internlm/internlm-chat-7b',\n                backend_config=backend_config)\n"
TEXTS = "['Hi, pls intro yourself', 'Shanghai is']"
MESSAGES = """prompts = [[{
    'role': 'user',
    'content': 'Hi, pls intro yourself'
}], [{
    'role': 'user',
    'content': 'Shanghai is'
}]]
"""
SNIPPETS = {
    "defaults": f"pipe = pipeline('internlm/internlm-chat-7b')\nresponse = pipe({TEXTS})\nprint(response)\n",
    "tp": f"{TP2}{PIPE}response = pipe({TEXTS})\nprint(response)\n",
    "sampling": f"{TP2}{SAMPLING}{PIPE}response = pipe({TEXTS},\n                gen_config=gen_config)\nprint(response)\n",
    "openai": f"{TP2}{SAMPLING}{PIPE}{MESSAGES}response = pipe(prompts,\n                gen_config=gen_config)\nprint(response)\n",
    "pytorch": f"backend_config = PytorchEngineConfig(session_len=2024)\n{SAMPLING}{PIPE}{MESSAGES}"
    "response = pipe(prompts, gen_config=gen_config)\nprint(response)\n",
}
