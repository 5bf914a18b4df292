"""Prompts with weights, and prompts of any length: text -> pieces -> tokens -> chunks. Imports no torch.

Weights are written as in AUTOMATIC1111's web UI, for which most published prompts are written: `(word)` has
1.1 times the weight, `[word]` 1 / 1.1 times, `(word:1.3)` 1.3 times, and nested weights multiply. A backslash
before a bracket or a backslash makes it a plain character. An unclosed bracket reaches to the end. With
PromptOptions.breaks the word BREAK begins a new chunk, and a chunk that is full may end at its last comma.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

BRACKET_WEIGHT = 1.1
MAX_WEIGHT = 10.0  # of a token, absolute; with a larger one the rest of the prompt has no effect
MAX_CHUNKS = 8  # per prompt
COMMA_BACKTRACK = 20  # tokens at the end of a chunk among which a comma is searched
BREAK = re.compile(r"\s*\bBREAK\b\s*")
SYNTAX = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|[^\\()\[\]:]+|:"
)


class PromptOptions(NamedTuple):
    """How prompts are read."""

    weighted: bool = False  # brackets are weights; else every character is text
    chunked: bool = False  # a prompt longer than the context fills several chunks; else it is truncated
    clip_skip: int = 1  # CLIP leaves out clip_skip - 1 layers more than the model's spec
    breaks: bool = False  # with weighted and chunked: BREAK and commas end chunks, as in A1111


class Piece(NamedTuple):
    """A part of a prompt whose tokens have one weight."""

    text: str
    weight: float = 1.0
    begins_chunk: bool = False  # BREAK stands before it


class Token(NamedTuple):
    """A token, and where its text begins: the index of its piece and of the character in it."""

    id: int
    weight: float = 1.0
    piece: int = 0
    start: int = 0
    breaks: int = 0  # chunks that end before the token: each BREAK ends one


class SpecialTokens(NamedTuple):
    """The special tokens of a chunk, and its length with them."""

    begin: int
    end: int
    pad: int
    length: int

    @property
    def room(self) -> int:
        """Tokens that fit between begin and end."""
        return self.length - 2

    def ids(self, chunk: Sequence[Token]) -> list[int]:
        """The ids of a whole chunk: begin, its tokens, end, padding."""
        padding = self.room - len(chunk)
        return [self.begin, *(token.id for token in chunk), self.end, *[self.pad] * padding]

    def weights(self, chunk: Sequence[Token]) -> list[float]:
        """The weights of a whole chunk; special tokens have weight 1."""
        return [1.0, *(token.weight for token in chunk), *[1.0] * (self.length - 1 - len(chunk))]


def parse(prompt: str, breaks: bool = False) -> list[Piece]:
    """The weighted pieces of a prompt, at least one. Neighbouring pieces differ in weight.

    breaks: pieces also end at the word BREAK, which is left out.
    """
    texts: list[str] = []
    weights: list[float] = []
    begins: list[bool] = []  # whether a chunk begins with the piece
    opened: dict[str, list[int]] = {"(": [], "[": []}  # index of the piece at which each open bracket began

    def close(bracket: str, factor: float) -> None:
        for index in range(opened[bracket].pop(), len(weights)):
            weights[index] *= factor

    for match in SYNTAX.finditer(prompt):
        if match["open"]:
            opened[match["open"]].append(len(texts))
        elif match["weight"] and opened["("]:
            close("(", float(match["weight"]))
        elif match["close"] == ")" and opened["("]:
            close("(", BRACKET_WEIGHT)
        elif match["close"] == "]" and opened["["]:
            close("[", 1 / BRACKET_WEIGHT)
        else:
            text = match[0] if match["escaped"] is None else match["escaped"]
            parts = BREAK.split(text) if breaks else [text]
            texts += parts
            weights += [1.0] * len(parts)
            begins += [False] + [True] * (len(parts) - 1)
    for bracket, factor in (("(", BRACKET_WEIGHT), ("[", 1 / BRACKET_WEIGHT)):
        starts = opened[bracket]
        for index in range(starts[0] if starts else len(weights), len(weights)):
            weights[index] *= factor ** sum(start <= index for start in starts)
    return merged(map(Piece, texts, weights, begins)) or [Piece("")]


def merged(pieces: Iterator[Piece]) -> list[Piece]:
    """Joins neighbours of equal weight and drops empty pieces."""
    out: list[Piece] = []
    for piece in pieces:
        if out and out[-1].weight == piece.weight and not piece.begins_chunk:
            out[-1] = out[-1]._replace(text=out[-1].text + piece.text)
        elif piece.text or piece.begins_chunk:
            out.append(piece)
    return out


def escape(text: str) -> str:
    """A weighted prompt that parses to the text itself, at weight 1."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def pieces_of(prompt: str, options: PromptOptions) -> list[Piece]:
    """The pieces of a prompt: as parse() reads it, or the whole text as one piece."""
    return parse(prompt, options.breaks) if options.weighted else [Piece(prompt)]


def tokens_of(
    pieces: Sequence[Piece],
    tokenize: Callable[[str], Sequence[tuple[int, int]]],
    learned_words: Mapping[str, Sequence[int]],
) -> list[Token]:
    """The tokens of pieces, each piece tokenized by itself.

    tokenize: text -> id and first character of each token. learned_words: words of textual inversion, in
    lower case -> the ids that replace them; parts of longer words are not replaced.
    """
    out: list[Token] = []
    breaks = 0  # since the last token
    for index, (text, weight, begins_chunk) in enumerate(pieces):
        breaks += begins_chunk
        for begin, part in split_on_words(text, learned_words):
            ids = learned_words.get(part.lower())
            found = tokenize(part) if ids is None else [(each, 0) for each in ids]
            out += [
                Token(each, weight, index, begin + start, 0 if number else breaks)
                for number, (each, start) in enumerate(found)
            ]
            breaks = 0 if found else breaks
    return out


def split_on_words(text: str, words: Mapping[str, Sequence[int]]) -> Iterator[tuple[int, str]]:
    """Splits a text at the given words: (first character, part) of each word and of the text between."""
    if not words:
        yield 0, text
        return
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in longest_first)
    start = 0
    for part in re.split(f"({pattern})", text, flags=re.IGNORECASE):
        if part:
            yield start, part
        start += len(part)


def chunks_of(
    tokens: Sequence[Token], room: int, options: PromptOptions, comma: int = -1
) -> list[Sequence[Token]]:
    """Chunks of at most `room` tokens, at least one; tokens past the last chunk are dropped.

    comma: the id of a comma's token, for options.breaks.
    """
    if options.breaks:
        return broken_chunks(tokens, room, comma)[:MAX_CHUNKS]
    limit = MAX_CHUNKS if options.chunked else 1
    return [tokens[begin : begin + room] for begin in range(0, max(len(tokens), 1), room)][:limit]


def broken_chunks(tokens: Sequence[Token], room: int, comma: int) -> list[Sequence[Token]]:
    """Chunks as A1111 makes them: each BREAK ends one, and a full one ends after a comma near its end."""
    chunks: list[Sequence[Token]] = []
    chunk: list[Token] = []
    last_comma: int | None = None  # its place in the chunk
    for token in tokens:
        for _ in range(token.breaks):
            chunks.append(chunk)
            chunk, last_comma = [], None
        if token.id == comma:
            last_comma = len(chunk)
        elif len(chunk) == room and last_comma is not None and room - last_comma <= COMMA_BACKTRACK:
            chunks.append(chunk[: last_comma + 1])
            chunk, last_comma = chunk[last_comma + 1 :], None
        if len(chunk) == room:
            chunks.append(chunk)
            chunk, last_comma = [], None
        chunk.append(token)
    return [*chunks, chunk] if chunk or not chunks else chunks


def truncated_text(pieces: Sequence[Piece], tokens: Sequence[Token], kept: int) -> str:
    """The end of a prompt of which the first `kept` tokens fit in its chunks; '' if all of it fits."""
    if len(tokens) <= kept:
        return ""
    first = tokens[kept]
    rest = "".join(piece.text for piece in pieces[first.piece + 1 :])
    return (pieces[first.piece].text[first.start :] + rest).strip()
