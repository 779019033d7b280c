"""Writes docs/options.md from the configuration classes: `python docs/make_options.py`.

Names, defaults and meanings are the dataclasses' own (their field docstrings); what is added here is the range in words and how
LMDeploy differs, then (v0.2.0, the document of January 2024) and now (0.16).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path
from typing import NamedTuple

from headrace.config import ChatTemplateConfig, GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig

PAGE = Path(__file__).parent / "options.md"
CLASSES = (GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig, ChatTemplateConfig)
NO_NOTE = "—"


class Note(NamedTuple):
    """What the dataclass itself doesn't say of a field."""

    range: str = NO_NOTE
    """`low to high` and `from low` are checked by a test against the class."""
    then: str = NO_NOTE
    now: str = NO_NOTE


ABSENT = "not there"
SAME = "the same"
COUNT = "from 1"
REFUSED = "only the default: anything else is refused by name"
GENERATION = {
    "n": Note("1 to 128", "ignored: always 1", "above 1 warns and becomes 1"),
    "max_new_tokens": Note(
        "None, or 1 to 2147483647", "no None; a prompt that left less room came back empty, without an error", SAME
    ),
    "top_p": Note("0 to 1", "out of range: ignored or clipped, by backend", SAME),
    "top_k": Note("0 to 2147483647", "TurboMind cut it at 1024", "default 50, and greedy unless `do_sample=True`"),
    "temperature": Note("0 to 2", "0 or less: not applied, which is not greedy", "0 warns and becomes `top_k=1`"),
    "repetition_penalty": Note(
        "0.001 to 1000", "TurboMind: after temperature; PyTorch: ignored", "over the output only, and not when greedy"
    ),
    "ignore_eos": Note(
        "True or False", "PyTorch: the token could be emitted, and stop words still stopped", "the same for tokens"
    ),
    "random_seed": Note(
        "None, or 0 to 18446744073709551615",
        "PyTorch: a second call with the same seed went on in its stream; unseeded prompts of a call shared one seed",
        "its low 32 bits",
    ),
    "stop_words": Note(
        "texts",
        "words of one token, matched by substring of vocabulary entries; they replaced the template's",
        "one token each",
    ),
    "bad_words": Note("texts", "words of one token", "one token each"),
    "min_p": Note("0 to 1", ABSENT, SAME),
    "presence_penalty": Note("-2 to 2", ABSENT, "accepted by the server and dropped"),
    "frequency_penalty": Note("-2 to 2", ABSENT, "accepted by the server and dropped"),
    "min_new_tokens": Note("0 to 2147483647, at most `max_new_tokens`", ABSENT, SAME),
    "stop_token_ids": Note("ids of the vocabulary", ABSENT, SAME),
    "bad_token_ids": Note("ids of the vocabulary", ABSENT, SAME),
    "logit_bias": Note("ids of the vocabulary; -100 to 100 each", ABSENT, ABSENT),
    "logprobs": Note(
        "None, or 0 to 20",
        ABSENT,
        "PyTorch: None unless `logprobs_mode` is set; TurboMind: after the filters, so zeros when greedy",
    ),
    "prompt_logprobs": Note("None, or 0 to 20", ABSENT, ABSENT),
    "skip_special_tokens": Note("True or False", "always True", SAME),
    "include_stop_str_in_output": Note("True or False", ABSENT, SAME),
    "response_format": Note(
        "None, or an object with `type`", ABSENT, "json_schema, json_object and regex_schema; dropped with speculative decoding"
    ),
}
PYTORCH = {
    "model_name": Note("a template's name, see `ChatTemplateConfig`", "empty: guessed from the directory's name", "removed"),
    "tp": Note(COUNT, "as many processes more, by `multiprocessing` with a global start method", "through Ray"),
    "session_len": Note("None, or from 1 to the model's length", "None: not limited by the engine", SAME),
    "max_batch_size": Note(COUNT, SAME, "None: by device"),
    "eviction_type": Note(REFUSED, "ignored: always recompute", "removed"),
    "prefill_interval": Note(COUNT, "ignored: always 16", SAME),
    "block_size": Note("a power of two, from 16", SAME, SAME),
    "num_cpu_blocks": Note(REFUSED, "0 took 4 GiB of pinned memory that was never used", "0 means 0"),
    "num_gpu_blocks": Note("from 0", "0: 0.7 of what is free on GPU 0; a number too large ran out of memory", SAME),
    "adapters": Note(REFUSED, "no way to name one in a call", "`adapter_name` of a call"),
    "max_prefill_token_num": Note(COUNT, "16384, and logits of every prompt token", "halved until the pool fits"),
    "cache_max_entry_count": Note("above 0, below 1", ABSENT, "before activations, by formula"),
    "enable_prefix_caching": Note("True or False", ABSENT, "default False"),
    "quant_policy": Note("0 or 8", ABSENT, "4: 4-bit, 8: 8-bit, and formats of 8 bits with a point"),
    "rope_scaling_factor": Note("below 1: off; from 1 to 1024", "from 1: dynamic NTK, fixed for each sequence", SAME),
    "use_logn_attn": Note("True or False", "scaled the queries beyond the trained length", SAME),
    "dtype": Note("one of these", ABSENT, SAME),
    "device": Note("one of these", ABSENT, "`device_type`"),
    "eager_mode": Note("True or False", "always eager", SAME),
}
TURBOMIND = {
    "model_name": PYTORCH["model_name"],
    "model_format": Note(
        "None, 'hf' or 'awq', as config.json says; 'llama' is refused by name",
        "'awq' with groups of 128 only, kept in 4 bits",
        "more formats",
    ),
    "tp": Note(COUNT, "a power of two", "any"),
    "session_len": Note("None, or from 1 to the model's length", "None: the template's, 2048 mostly", SAME),
    "max_batch_size": PYTORCH["max_batch_size"],
    "cache_max_entry_count": Note(
        "above 0, below 1, or whole from 1", "fraction of the device's whole memory", "0.8, of what is free after the weights"
    ),
    "quant_policy": Note("0, 4 or 8", "4: 8-bit KV with scales from a calibration", "4: 4-bit, 8: 8-bit, without calibration"),
    "rope_scaling_factor": PYTORCH["rope_scaling_factor"],
    "use_logn_attn": PYTORCH["use_logn_attn"],
}
TEMPLATE_TEXT = Note("None or a text", "some families ignored it, some used it as another field", SAME)
TEMPLATE = {
    "model_name": Note("a name of the list below", "33 names; None: guessed", "11 names; else the tokenizer's"),
    **dict.fromkeys(("system", "meta_instruction", "eosys", "user", "eoh", "assistant", "eoa"), TEMPLATE_TEXT),
    "capability": Note("None or one of these", SAME, SAME),
    "stop_words": Note("texts", ABSENT, "they replace the template's"),
}
NOTES = dict(zip(CLASSES, (GENERATION, PYTORCH, TURBOMIND, TEMPLATE), strict=True))
HEAD = """# Options

Every field takes effect, on a CPU as on a GPU, or is refused by name when it is used (`UnsupportedOption`, with the field as `param`).
A value out of range is refused when the object is built (`InvalidRequest`, a `ValueError`). One class serves `pipeline()`, REST, the
queue and the command line; on a wire a field that has its default is left out.

This page is written by `python docs/make_options.py`. "Then" is LMDeploy v0.2.0, whose document these classes follow; "now" is 0.16.
"""


def meanings(cls: type) -> dict[str, str]:
    """Return each field's docstring: the string that stands after it in the class."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        text = after.value if isinstance(after, ast.Expr) else None
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Constant):
            found[field.target.id] = " ".join(str(text.value).split())
    return found


def table(cls: type) -> str:
    """Return a class's table: one row for each field."""
    texts, notes = meanings(cls), NOTES[cls]
    rows = ["| Field | Default | Meaning | Range | Then | Now |", "|---|---|---|---|---|---|"]
    for spec in dataclasses.fields(cls):
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        default = spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default
        note = notes.get(spec.name, Note())
        cells = (f"`{spec.name}`", "required" if required else f"`{default!r}`", texts.get(spec.name, NO_NOTE), *note)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def page() -> str:
    """Return the whole page."""
    from engine.template_families import FAMILIES  # not for those who only want a table

    parts = [HEAD]
    for cls in CLASSES:
        doc = inspect.cleandoc(cls.__doc__ or "")
        parts.append(f"## {cls.__name__}\n\n{doc}\n\n{table(cls)}\n")
    names = ", ".join(f"`{name}`" for name in sorted((*FAMILIES, "hf")))
    parts.append(f"`hf` is the tokenizer's own template, which is used where no name is given. The names: {names}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
