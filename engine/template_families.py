"""The named chat templates, as data: what stands around each turn, in the form the models were trained with.

`engine.templates.render_turns` is the one rule that reads these rows. Spaces and newlines are part of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateParts:
    """One family. A conversation is `{system}{text}{eosys}`, then `{user}{text}{eoh}` and `{assistant}{text}{eoa}` in turn."""

    system: str = ""
    meta_instruction: str = ""
    """The system text of a conversation that brings none; '' leaves the system part out."""
    eosys: str = ""
    user: str = ""
    eoh: str = ""
    assistant: str = ""
    eoa: str = ""
    opening: str | None = None
    """What ends the prompt so that the model answers; None: `assistant`. Differs where that ends in a space, which the
    model writes itself: left in the prompt it becomes a token of its own that the model never saw there."""
    round_number: tuple[str, str] | None = None
    """What stands before and after the round's number, which goes before `user`; counted from 1 in each conversation anew."""
    system_inside_user: bool = False
    """The system part stands between the first turn's `user` and its text."""
    stop_words: tuple[str, ...] = ()
    is_raw: bool = False
    """A base model: text is continued as it is, and messages have no form."""
    infill: tuple[str, str, str] | None = None
    """What stands before the prefix, before the suffix and before the middle that is to be written."""


_INTERNLM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
    "English and 中文."
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_SOLAR = "You are an AI assistant that follows instruction extremely well. Help as much as you can."
_RAW = TemplateParts(is_raw=True)
_IM_END = "<|im_end|>\n"


def _chatml(meta_instruction: str, *stop_words: str) -> TemplateParts:
    return TemplateParts(
        system="<|im_start|>system\n",
        meta_instruction=meta_instruction,
        eosys=_IM_END,
        user="<|im_start|>user\n",
        eoh=_IM_END,
        assistant="<|im_start|>assistant\n",
        eoa=_IM_END,
        stop_words=stop_words,
    )


_INTERNLM_CHAT = TemplateParts(
    system="<|System|>:",
    meta_instruction=_INTERNLM,
    eosys="\n",
    user="<|User|>:",
    eoh="\n",
    assistant="<|Bot|>:",
    eoa="<eoa>\n",
    stop_words=("<eoa>",),
)
_INTERNLM2_CHAT = _chatml(_INTERNLM, "<|im_end|>", "<|action_end|>")
_QWEN = _chatml("You are a helpful assistant.", "<|im_end|>")
_YI = _chatml("", "<|im_end|>", "<|endoftext|>")
_VICUNA_PARTS = TemplateParts(
    meta_instruction=_VICUNA, eosys=" ", user="USER: ", eoh=" ", assistant="ASSISTANT: ", eoa="</s>", opening="ASSISTANT:"
)
_LLAMA2 = TemplateParts(
    system="<<SYS>>\n",
    eosys="\n<</SYS>>\n\n",
    user="[INST] ",
    eoh=" [/INST]",
    assistant=" ",
    eoa=" </s><s>",
    opening="",
    system_inside_user=True,
)
_CODELLAMA = replace(_LLAMA2, infill=("<PRE> ", " <SUF>", " <MID>"))
_SOLAR_PARTS = TemplateParts(
    system="### System:\n",
    meta_instruction=_SOLAR,
    eosys="\n\n",
    user="### User:\n",
    eoh="\n\n",
    assistant="### Assistant:\n",
    eoa="\n\n",
)
_BAICHUAN2 = TemplateParts(user="<reserved_106>", assistant="<reserved_107>")
_ULTRACM = TemplateParts(
    eosys="\n", user="User: ", eoh="</s>\n", assistant="Assistant: ", eoa="</s>\n", opening="Assistant:", stop_words=("</s>",)
)
_CHATGLM2 = TemplateParts(
    round_number=("[Round ", "]\n\n"), eosys="\n\n", user="问：", eoh="\n\n", assistant="答：", eoa="\n\n"
)
# The instruct models go on with the user's next question where nothing stops them.
_FALCON = TemplateParts(
    eosys="\n\n",
    user="User: ",
    eoh="\n\n",
    assistant="Assistant: ",
    eoa="\n\n",
    opening="Assistant:",
    stop_words=("\nUser:",),
)

FAMILIES: Mapping[str, TemplateParts] = {
    **dict.fromkeys(("base", "llama", "internlm", "internlm-7b", "internlm-20b", "baichuan-7b", "baichuan-base"), _RAW),
    **dict.fromkeys(("internlm2-7b", "internlm2-20b", "internlm2-1_8b"), _RAW),
    **dict.fromkeys(("internlm-chat", "internlm-chat-7b", "internlm-chat-7b-8k", "internlm-chat-20b"), _INTERNLM_CHAT),
    **dict.fromkeys(("internlm2", "internlm2-chat", "internlm2-chat-7b", "internlm2-chat-20b"), _INTERNLM2_CHAT),
    **dict.fromkeys(("qwen", "qwen-7b", "qwen-14b"), _QWEN),
    "chatml": _chatml("", "<|im_end|>"),
    **dict.fromkeys(("yi", "yi-chat", "yi-200k", "yi-34b"), _YI),
    **dict.fromkeys(("vicuna", "wizardlm"), _VICUNA_PARTS),
    **dict.fromkeys(("llama2", "llama-2", "llama-2-chat"), _LLAMA2),
    "codellama": _CODELLAMA,
    **dict.fromkeys(("solar", "solar-70b"), _SOLAR_PARTS),
    **dict.fromkeys(("baichuan2", "baichuan2-7b"), _BAICHUAN2),
    **dict.fromkeys(("ultracm", "ultralm"), _ULTRACM),
    **dict.fromkeys(("chatglm2", "chatglm2-6b"), _CHATGLM2),
    "falcon": _FALCON,
    "puyu": TemplateParts(),
}
"""Template name to its parts."""
