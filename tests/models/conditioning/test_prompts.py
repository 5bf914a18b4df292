"""The grammar of weights, chunks, and the contexts made from both."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from models.checkpoint.tokenizers import clip
from models.conditioning.conditioner import ConditioningInput
from models.conditioning.prompt_tokenizer import PromptTokenizer
from models.conditioning.prompts import (
    MAX_CHUNKS,
    Piece,
    PromptOptions,
    SpecialTokens,
    Token,
    chunks_of,
    escape,
    parse,
    pieces_of,
    tokens_of,
    truncated_text,
)
from tests.checkpoints.tiny import random_model, tiny_spec, xl_spec

TRUNCATED, WEIGHTED, CHUNKED, BOTH = (
    PromptOptions(),
    PromptOptions(True),
    PromptOptions(False, True),
    PromptOptions(True, True),
)
GRAMMAR = [  # as AUTOMATIC1111's web UI reads them
    ("", [("", 1)]),
    ("a cat", [("a cat", 1)]),
    ("a (cat) here", [("a ", 1), ("cat", 1.1), (" here", 1)]),
    ("a [cat]", [("a ", 1), ("cat", 1 / 1.1)]),
    ("a (cat:1.3)", [("a ", 1), ("cat", 1.3)]),
    ("a (cat: .5 )", [("a ", 1), ("cat", 0.5)]),
    ("(cat:-1)", [("cat", -1)]),
    ("((cat))", [("cat", 1.21)]),
    ("((cat:2) dog)", [("cat", 2.2), (" dog", 1.1)]),
    ("(a [b] c)", [("a ", 1.1), ("b", 1), (" c", 1.1)]),
    (r"\(cat\) \[dog\]", [("(cat) [dog]", 1)]),
    (r"(a\(b\):2)", [("a(b)", 2)]),
    (r"back\\slash", [(r"back\slash", 1)]),
    (r"back\slash", [("backslash", 1)]),
    ("(unclosed", [("unclosed", 1.1)]),
    ("a [(unclosed", [("a unclosed", 1)]),
    ("a (b [c", [("a ", 1), ("b ", 1.1), ("c", 1)]),
    ("unopened) a]", [("unopened) a]", 1)]),
    ("unopened:1.3)", [("unopened:1.3)", 1)]),
    ("[cat:1.3]", [("cat:1.3", 1 / 1.1)]),
    ("ratio 16:9, (red: blue)", [("ratio 16:9, ", 1), ("red: blue", 1.1)]),
    ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
    ("()(a)[]", [("a", 1.1)]),
]


@pytest.mark.parametrize(("prompt", "pieces"), GRAMMAR, ids=[prompt for prompt, _ in GRAMMAR])
def test_grammar(prompt, pieces):
    found = parse(prompt)
    assert [piece.text for piece in found] == [text for text, _ in pieces]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in pieces])


TEXTS = st.text(alphabet="ab ()[]:\\.12", max_size=40)


@given(TEXTS)
def test_neighbouring_pieces_have_different_weights(text):
    pieces = parse(text)
    assert pieces
    assert all(a.weight != b.weight for a, b in pairwise(pieces))
    assert len("".join(piece.text for piece in pieces)) <= len(text)


@given(TEXTS)
def test_an_escaped_text_parses_to_itself(text):
    assert parse(escape(text)) == [Piece(text)]


@given(st.text(alphabet="ab .,", min_size=1), st.integers(1, 6), st.integers(0, 6))
def test_nested_weights_multiply(text, up, down):
    (piece,) = parse("(" * up + "[" * down + text + "]" * down + ")" * up)
    assert piece.text == text
    assert piece.weight == pytest.approx(1.1 ** (up - down))


@given(st.integers(0, 40), st.integers(1, 7), st.booleans())
@example(0, 5, True)
def test_chunks_hold_all_tokens_in_order(count, room, chunked):
    tokens, special = (
        [Token(index, 1 + index, 0, index) for index in range(count)],
        SpecialTokens(97, 98, 99, room + 2),
    )
    chunks = chunks_of(tokens, room, PromptOptions(chunked=chunked))
    kept = [token for chunk in chunks for token in chunk]
    assert kept == tokens[: room * (MAX_CHUNKS if chunked else 1)]
    for chunk in chunks:
        ids, weights = special.ids(chunk), special.weights(chunk)
        assert len(ids) == len(weights) == special.length
        assert ids == [97, *(token.id for token in chunk), 98, *[99] * (room - len(chunk))]
        assert weights[1 : 1 + len(chunk)] == [token.weight for token in chunk]
        assert {weights[0], *weights[1 + len(chunk) :]} == {1}
    assert truncated_text([Piece("x" * count)], tokens, sum(map(len, chunks))) == "x" * (count - len(kept))


def test_learned_words_become_their_ids_where_they_are_whole_words():
    def letters(text):
        return [(ord(letter), index) for index, letter in enumerate(text)]

    words = {"cat": (1, 2), "cat-toy": (3,), "<dog>": (4,)}
    read = tokens_of([Piece("a"), Piece("bCat Cat,", 2.0), Piece("cat-toy<dog>")], letters, words)
    assert [token.id for token in read] == [97, *map(ord, "bCat "), 1, 2, ord(","), 3, 4]
    assert [token.weight for token in read] == [1.0] + [2.0] * 8 + [1.0] * 2
    assert [token.start for token in read[-2:]] == [0, 7]


@pytest.fixture(scope="module")
def tokenizer():
    return clip()


def test_a_plain_prompt_has_the_tokenizers_ids(tokenizer):
    texts = [
        text
        for text, _ in json.loads((Path(__file__).parents[1] / "checkpoint" / "clip_ids.json").read_text())
    ]
    texts += ["", " ", "a photo of a cat " * 30]
    how = {"padding": "max_length", "max_length": 77, "truncation": True}
    ids, weights = PromptTokenizer(tokenizer, 77).table(texts, TRUNCATED)
    assert ids.tolist() == tokenizer(texts, **how)["input_ids"]
    assert weights is None


def test_the_truncated_end_is_reported_without_brackets(tokenizer):
    tokenized = PromptTokenizer(tokenizer, 77)
    prompt = "(red " * 70 + "green [blue] " + "(cat:1.5) " * 10
    assert tokenized.overflow(prompt, WEIGHTED).startswith("cat")
    assert tokenized.overflow(prompt, BOTH) == ""
    assert len(tokenized.chunks(prompt, BOTH)) == 2
    assert tokenized.overflow("cat " * 603, CHUNKED) == "cat cat cat"
    assert tokenized.overflow("cat " * 75, TRUNCATED) == ""


def context_pair(model, prompt, negative, options):
    return model.context_pair(ConditioningInput(prompt, negative, prompt_options=options))


@pytest.fixture(scope="module", params=[tiny_spec, xl_spec])
def model(request):
    return random_model(request.param())


@torch.inference_mode()
def test_chunks_are_concatenated_and_the_shorter_prompt_is_padded(model):
    text = "red apple " * 9 + "on a blue table"  # letters are tokens here
    room = model.spec.texts[0].tokens - 2
    tokens = tokens_of(pieces_of(text, TRUNCATED), model.conditioner.encoders[0].prompt_tokenizer.split, {})
    begin = tokens[room].start
    whole = context_pair(model, text, "no", CHUNKED)
    parts = [
        context_pair(model, part, negative, TRUNCATED)
        for part, negative in ((text[:begin], "no"), (text[begin:], ""))
    ]
    length = model.spec.texts[0].tokens
    assert whole.tokens.shape[1] == 2 * length
    assert model.context_shape(ConditioningInput(text, "no", prompt_options=CHUNKED)) == tuple(
        whole.tokens.shape[1:]
    )
    torch.testing.assert_close(whole.tokens[1], torch.cat([part.tokens[1] for part in parts]))
    empty = model.conditioner([""])[0]
    torch.testing.assert_close(whole.tokens[0], torch.cat([parts[0].tokens[0], empty]))
    if whole.pooled is not None:
        torch.testing.assert_close(whole.pooled, parts[0].pooled)


@torch.inference_mode()
def test_weights_scale_token_vectors_and_keep_the_mean_of_each_encoder(model):
    plain = context_pair(model, "red apple here", "green", TRUNCATED)
    weighted = context_pair(model, "red (apple:1.5) here", "green", WEIGHTED)
    begin = 1 + len("red")
    factors = torch.ones(model.spec.texts[0].tokens, 1)
    factors[begin : begin + len("apple")] = 1.5
    expected, start = [], 0
    for text in model.spec.texts:
        z = plain.tokens[1][:, start : start + text.width].double()
        start += text.width
        more = z * factors
        expected.append(more * (z.mean() / more.mean()))
    torch.testing.assert_close(weighted.tokens[1].double(), torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)
    assert torch.equal(weighted.tokens[0], plain.tokens[0])
    if plain.pooled is not None:
        assert torch.equal(weighted.pooled, plain.pooled)


@torch.inference_mode()
def test_a_prompt_without_brackets_is_the_same_with_all_options(model):
    plain = context_pair(model, "red apple", "green", TRUNCATED)
    for options in (WEIGHTED, CHUNKED, BOTH):
        assert torch.equal(context_pair(model, "red apple", "green", options).tokens, plain.tokens)


BROKEN = PromptOptions(weighted=True, chunked=True, breaks=True)


def words_in_chunks(prompt: str, room: int = 75) -> list[str]:
    """The chunks of a prompt whose tokens are words and commas."""

    def tokenize(text: str) -> list[tuple[int, int]]:
        return [(0 if match[0] == "," else 1, match.start()) for match in re.finditer(r"\w+|,", text)]

    pieces = pieces_of(prompt, BROKEN)
    words = [re.findall(r"\w+|,", piece.text) for piece in pieces]
    tokens = tokens_of(pieces, tokenize, {})
    flat = iter([word for group in words for word in group])
    return [" ".join(next(flat) for _ in chunk) for chunk in chunks_of(tokens, room, BROKEN, comma=0)]


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a b", ["a b"]),
        ("a BREAK b", ["a", "b"]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("BREAK a BREAK", ["", "a"]),
        ("(a BREAK b:1.2) c", ["a", "b c"]),
        ("BREAKFAST aBREAK", ["BREAKFAST aBREAK"]),
    ],
)
def test_break_ends_a_chunk(prompt, chunks):
    assert words_in_chunks(prompt) == chunks


def test_a_full_chunk_ends_after_a_comma_among_its_last_20_tokens():
    def prompt(before: int, after: int) -> str:
        return " ".join(["w"] * before) + " , " + " ".join(["x"] * after)

    assert [chunk.count("x") for chunk in words_in_chunks(prompt(55, 30))] == [0, 30]
    assert [chunk.count("x") for chunk in words_in_chunks(prompt(54, 30))] == [20, 10]
    assert [chunk.count("x") for chunk in words_in_chunks(prompt(55, 19))] == [19]
    assert words_in_chunks(prompt(75, 1)) == [" ".join(["w"] * 75), ", x"]
