"""Prompts that change during a run: tables written from the rules of AUTOMATIC1111's web UI."""

from __future__ import annotations

import time

import pytest

from models.conditioning.prompt_schedule import (
    MAX_PARTS,
    MAX_TEXTS,
    Part,
    PromptError,
    compose,
    schedule,
    split,
)

# prompt -> (last step, text) of a run of 10 steps
SCHEDULES = [
    ("a cat", [(10, "a cat")]),
    ("a [cat:3]", [(3, "a "), (10, "a cat")]),
    ("a [cat: 3 ]", [(3, "a "), (10, "a cat")]),
    ("a [cat::3]", [(3, "a cat"), (10, "a ")]),
    ("a [cat:dog:.5] b", [(5, "a cat b"), (10, "a dog b")]),
    ("a [cat : dog : 1] b", [(1, "a cat  b"), (10, "a  dog  b")]),
    ("[cat:dog:1.0]", [(10, "cat")]),
    ("[cat:dog:25]", [(10, "cat")]),
    ("[cat:dog:0]", [(10, "dog")]),
    ("[cat:dog:-1]", [(10, "dog")]),
    ("[cat:dog:0.55]", [(5, "cat"), (10, "dog")]),
    ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
    ("[(cat:1.2):3]", [(3, ""), (10, "(cat:1.2)")]),
    ("(a [cat:dog:4]:1.2)", [(4, "(a cat:1.2)"), (10, "(a dog:1.2)")]),
    ("a [cat:dog:4] [sun:moon:2]", [(2, "a cat sun"), (4, "a cat moon"), (10, "a dog moon")]),
    (r"a \[cat:dog:4\]", [(10, r"a \[cat:dog:4\]")]),
    (r"[a\:b\|c:3]", [(3, ""), (10, r"a\:b\|c")]),
    ("a [cat", [(10, "a [cat")]),
    ("a [cat:dog]", [(10, "a [cat:dog]")]),
    ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
    ("a|b [cat:dog:3]", [(10, "a|b [cat:dog:3]")]),
    ("[a|b:3]", [(10, "[a|b:3]")]),
    ("[cat:dog:3]\\", [(10, "[cat:dog:3]\\")]),
]


@pytest.mark.parametrize(("prompt", "expected"), SCHEDULES, ids=[prompt for prompt, _ in SCHEDULES])
def test_a_prompt_is_edited_after_the_step_that_it_names(prompt, expected):
    assert schedule(prompt, 10) == expected


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("[a|b]", ["a", "b", "a", "b"]),
        ("[fe|]male", ["female", "male", "female", "male"]),
        ("[a|b|c]", ["a", "b", "c", "a"]),
        ("[a|[b|c]]", ["a", "c", "a", "c"]),
        ("[[a|b]:x:2]", ["a", "b", "x", "x"]),
    ],
)
def test_alternatives_change_at_every_step(prompt, texts):
    assert schedule(prompt, 4) == list(enumerate(texts, 1))


def texts_of(prompt: str, calls: int, steps: int, negative: str = "", **options: int) -> list[str]:
    """The text of the first part at each UNet call."""
    made = compose(prompt, negative, calls, steps, **options)
    return [made.texts[call.positive[0]] for call in made.calls]


def test_calls_are_counted_from_0_and_steps_from_1():
    assert texts_of("[a:b:5]", 8, 8) == ["a"] * 6 + ["b"] * 2
    assert texts_of("[a|b]", 6, 6) == ["a", "a", "b", "a", "b", "a"]


def test_a_shorter_run_ends_before_the_end_of_the_schedule():
    assert texts_of("[a:b:0.5]", 4, 10) == ["a"] * 4


def test_both_passes_of_a_run_share_one_axis():
    assert texts_of("[a:b:1.5]", 4, 4, first_pass=10) == ["a"] * 3 + ["b"]
    assert texts_of("[a:b:12]", 4, 4, first_pass=10) == ["a"] * 3 + ["b"]
    assert texts_of("[a:b:0.5]", 4, 4, first_pass=10) == ["b"] * 4


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat AND a dog", [("a cat", 1.0), (" a dog", 1.0)]),
        ("a cat :1.2 AND a dog: -0.5 ", [("a cat", 1.2), (" a dog", -0.5)]),
        ("(a:1.2) AND b:2", [("(a:1.2)", 1.0), (" b", 2.0)]),
        ("HAND AND sAND\nb", [("HAND", 1.0), (" sAND\nb", 1.0)]),
        ("a:1 b", [("a:1 b", 1.0)]),
    ],
)
def test_and_separates_parts_with_weights(prompt, parts):
    assert split(prompt) == [Part(text, weight) for text, weight in parts]


def test_every_distinct_text_is_in_the_composition_once():
    made = compose("[a|b] AND a", "[no:never:2]", 5, 5)
    assert made.texts == ("no", "a", " a", "b", "never")
    assert made.is_negative == (True, False, False, False, True)
    assert [call.negative for call in made.calls] == [0, 0, 0, 4, 4]
    assert [call.positive for call in made.calls] == [(1, 2), (1, 2), (3, 2), (1, 2), (3, 2)]
    assert made.calls[0].weights == (1.0, 1.0)
    assert compose("a", "a AND b", 1, 1).texts == ("a AND b", "a")


def test_prompts_have_limits():
    with pytest.raises(PromptError, match="AND"):
        compose(" AND ".join("a" * (MAX_PARTS + 1)), "", 2, 2)
    with pytest.raises(PromptError, match="versions"):
        compose("[" + "|".join(map(str, range(MAX_TEXTS + 1))) + "]", "", 100, 100)
    with pytest.raises(PromptError, match="deep"):
        schedule("[" * 101 + "]" * 101, 2)


def test_hostile_prompts_are_read_quickly():
    begin = time.monotonic()
    for text in ("[a:" * 90, "[a|b]" * 800, "(" * 90 + ":" * 3000, ":" * 4000, "[a:b:1]" * 500, "\\" * 4001):
        schedule(text, 1000)
    assert time.monotonic() - begin < 10
