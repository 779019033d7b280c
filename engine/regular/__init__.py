"""Response formats that are regular languages, as automata over bytes. No tokens, no requests, no device.

automaton_of(format)   the one door: an automaton, or None where the format has to be followed by a grammar library

expression · automaton   trees of characters, and what they are compiled to
pattern · json_schema    what is read into such trees, and what isn't
"""

from __future__ import annotations

from functools import lru_cache

from engine.regular.automaton import Automaton, compile_expression
from engine.regular.expression import Expression, TooLargeError
from engine.regular.json_schema import read_schema
from engine.regular.pattern import NotRegularError, read_pattern
from headrace.response_format import ResponseFormat

__all__ = ["Automaton", "automaton_of"]

_KEPT = 512


def automaton_of(wanted: ResponseFormat) -> Automaton | None:
    """Return the automaton of a format; None: it isn't regular, or too large, or more than is understood here.

    The answer depends on the format alone, so that the same request is followed the same way on every device and every rank.
    A format that means nothing at all gives None as well: the library that it is left to says why.
    """
    return _compiled(wanted.type, wanted.source)


@lru_cache(maxsize=_KEPT)
def _compiled(kind: str, source: str) -> Automaton | None:
    try:
        return compile_expression(_read(kind, source))
    except (NotRegularError, TooLargeError, RecursionError):
        return None


def _read(kind: str, source: str) -> Expression:
    if kind == "json_schema":
        return read_schema(source)
    if kind == "regex":
        return read_pattern(source)
    raise NotRegularError(kind)
