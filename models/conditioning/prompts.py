"""Prompts with weights, and prompts of any length: text -> pieces -> tokens -> chunks. Free of torch.

The grammar of weights is that of AUTOMATIC1111's web UI, which most prompts in the wild are written for:
`(word)` has 1.1 times the weight, `[word]` 1 / 1.1 times, `(word:1.3)` 1.3 times, nested ones multiply, and a
backslash before a bracket or a backslash makes it a plain character. What is never closed goes to the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

BRACKET = 1.1
MOST_WEIGHT = 10.0  # of a token, in size; beyond, nothing is left of the rest of a prompt
MOST_CHUNKS = 8  # contexts that one prompt may fill
SYNTAX = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|[^\\()\[\]:]+|:"
)


class Reading(NamedTuple):
    """How prompts are read."""

    weighted: bool = False  # by the grammar above
    chunked: bool = False  # what is longer than a context fills several, side by side; else it is cut


class Piece(NamedTuple):
    """A part of a prompt whose tokens have one weight."""

    text: str
    weight: float = 1.0


class Token(NamedTuple):
    """One token; piece and place: where in which piece its text begins."""

    id: int
    weight: float = 1.0
    piece: int = 0
    place: int = 0


class Frame(NamedTuple):
    """What stands around a chunk's tokens, to a length of so many with them."""

    begin: int
    end: int
    pad: int
    length: int

    @property
    def room(self) -> int:
        """Tokens that fit between begin and end."""
        return self.length - 2

    def ids(self, chunk: Sequence[Token]) -> list[int]:
        empty = self.room - len(chunk)
        return [self.begin, *(token.id for token in chunk), self.end, *[self.pad] * empty]

    def weights(self, chunk: Sequence[Token]) -> list[float]:
        return [1.0, *(token.weight for token in chunk), *[1.0] * (self.length - 1 - len(chunk))]


def parse(prompt: str) -> list[Piece]:
    """The pieces of a prompt with weights, neighbours of equal weight in one; at least one."""
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each bracket that is open begins

    def close(bracket: str, factor: float) -> None:
        for index in range(opened[bracket].pop(), len(weights)):
            weights[index] *= factor

    for match in SYNTAX.finditer(prompt):
        if match["open"]:
            opened[match["open"]].append(len(texts))
        elif match["weight"] and opened["("]:
            close("(", float(match["weight"]))
        elif match["close"] == ")" and opened["("]:
            close("(", BRACKET)
        elif match["close"] == "]" and opened["["]:
            close("[", 1 / BRACKET)
        else:
            texts.append(match[0] if match["escaped"] is None else match["escaped"])
            weights.append(1.0)
    for bracket, factor in (("(", BRACKET), ("[", 1 / BRACKET)):
        starts = opened[bracket]
        for index in range(starts[0] if starts else len(weights), len(weights)):
            weights[index] *= factor ** sum(start <= index for start in starts)
    return merged(map(Piece, texts, weights)) or [Piece("")]


def merged(pieces: Iterator[Piece]) -> list[Piece]:
    """Neighbours of equal weight in one, empty ones dropped."""
    out: list[Piece] = []
    for piece in pieces:
        if out and out[-1].weight == piece.weight:
            out[-1] = Piece(out[-1].text + piece.text, piece.weight)
        elif piece.text:
            out.append(piece)
    return out


def escape(text: str) -> str:
    """A prompt with weights that says the text itself."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def pieces_of(prompt: str, reading: Reading) -> list[Piece]:
    return parse(prompt) if reading.weighted else [Piece(prompt)]


def tokens_of(
    pieces: Sequence[Piece],
    tokenize: Callable[[str], Sequence[tuple[int, int]]],
    words: Mapping[str, Sequence[int]],
) -> list[Token]:
    """The tokens of pieces, each piece by itself.

    tokenize: a text -> id and first character of each token; words: in lower case, and the ids that each
    becomes wherever it stands by itself.
    """
    out = []
    for index, (text, weight) in enumerate(pieces):
        for begin, part in parted(text, words):
            known = words.get(part.lower())
            found = tokenize(part) if known is None else [(each, 0) for each in known]
            out += [Token(each, weight, index, begin + place) for each, place in found]
    return out


def parted(text: str, words: Mapping[str, Sequence[int]]) -> Iterator[tuple[int, str]]:
    """A text in parts, each with its first character's place: words that are known, and what is between."""
    if not words:
        yield 0, text
        return
    longest = sorted(words, key=len, reverse=True)
    pattern = "|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in longest)
    place = 0
    for part in re.split(f"({pattern})", text, flags=re.IGNORECASE):
        if part:
            yield place, part
        place += len(part)


def chunks_of(tokens: Sequence[Token], room: int, reading: Reading) -> list[Sequence[Token]]:
    """At least one, each of at most `room`; what is beyond the last is left out."""
    most = MOST_CHUNKS if reading.chunked else 1
    return [tokens[begin : begin + room] for begin in range(0, max(len(tokens), 1), room)][:most]


def left_out(pieces: Sequence[Piece], tokens: Sequence[Token], room: int, reading: Reading) -> str:
    """The end of a prompt that its chunks have no place for; '' if there is none."""
    kept = room * (MOST_CHUNKS if reading.chunked else 1)
    if len(tokens) <= kept:
        return ""
    first = tokens[kept]
    rest = "".join(piece.text for piece in pieces[first.piece + 1 :])
    return (pieces[first.piece].text[first.place :] + rest).strip()
