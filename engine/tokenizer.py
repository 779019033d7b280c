"""Text to token ids and back, by the model's own tokenizer. Code that ships with a model is never run.

This module doesn't know which text is a chat: `encode_chat` takes a rendered conversation, whose special tokens are already
in the text, and `encode_raw` takes bare text, which gets the special tokens that the tokenizer itself would add.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.errors import ModelLoadError

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """A thread-safe view of one Hugging Face tokenizer."""

    def __init__(self, path: Path | str) -> None:
        """Load from a local model directory; raise `ModelLoadError` where there is no usable tokenizer."""
        from transformers import AutoTokenizer  # seconds of import: not for those who only import the module

        try:
            self.hf: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except Exception as error:
            raise ModelLoadError(f"no tokenizer can be loaded from {path}: {error}") from error
        # Rust tokenizers raise "Already borrowed" when one thread changes padding or truncation while another encodes, and
        # Python ones aren't made for threads at all; encoding is far cheaper than generating, so one lock costs nothing.
        self._lock = threading.Lock()
        self._rust: Any = getattr(self.hf, "backend_tokenizer", None) if getattr(self.hf, "is_fast", False) else None
        self.vocab_size: int = len(self.hf)
        eos = self.hf.eos_token_id
        self.eos_ids: tuple[int, ...] = () if eos is None else (int(eos),)
        vocab: dict[str, int] = self.hf.get_vocab()
        self.byte_ids = frozenset(index for piece, index in vocab.items() if _BYTE_PIECE.fullmatch(piece))
        """Byte-fallback pieces (`<0xE6>`): a run of them is only text when the whole run is known."""
        self._special: dict[str, int] = {str(token): int(index) for index, token in self.hf.added_tokens_decoder.items()}
        self.special_texts = {index: text for text, index in self._special.items()}
        """The added tokens' own texts, by id."""
        added = self.hf.added_tokens_decoder.items()
        self.skipped_ids = frozenset(int(index) for index, token in added if token.special)
        """What decoding with `skip_special_tokens` leaves out before it makes text of the rest."""
        self.bos_text = self._own_bos()
        """The BOS token's text where the tokenizer puts it before every text; else ''."""

    def _own_bos(self) -> str:
        bos = self.hf.bos_token_id
        head = self.encode_raw("a")[:1]
        return str(self.hf.bos_token) if bos is not None and head == (bos,) else ""

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's own Jinja chat template."""
        template = self.hf.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def encode_chat(self, text: str) -> tuple[int, ...]:
        """Encode a rendered conversation: no second BOS."""
        return self._encode(text, add_special_tokens=False)

    def encode_raw(self, text: str) -> tuple[int, ...]:
        """Encode bare text, with the special tokens the tokenizer adds by itself."""
        return self._encode(text, add_special_tokens=True)

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        text.encode()  # a tokenizer says of half a surrogate pair that it wants a text, without a word of why
        with self._lock:
            # verbose=False: the tokenizer would warn of "longer than the maximum"; the session length is checked by us.
            ids = self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return tuple(int(i) for i in ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode; bytes that aren't UTF-8 become U+FFFD. Spaces are never tidied: that would change text already streamed."""
        if self._rust is not None:
            return str(self._rust.decode(list(ids), skip_special_tokens=skip_special_tokens))
        with self._lock:
            text = self.hf.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)

    def special_id(self, text: str) -> int | None:
        """Return the id of the added token with exactly this text ('<|im_end|>'), if there is one."""
        return self._special.get(text)

    def render(self, messages: Sequence[Any], *, continue_final: bool) -> str:
        """Render a conversation with the tokenizer's own template; template errors come through as they are."""
        with self._lock:
            text = self.hf.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=not continue_final, continue_final_message=continue_final
            )
        return str(text)
