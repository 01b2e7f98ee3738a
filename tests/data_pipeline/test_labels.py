"""Which tokens are labels, token by token, and where frames may land: cases written by hand."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data_pipeline.prompts import Prompt, PromptBuilder, PromptForm
from data_pipeline.schema import Message
from data_pipeline.tokens import SpecialTokens, token_text

TEXT = "A man walks in and sits down . Who is it He Be brief system user assistant"
MARKED = [token_text(name) for name in SpecialTokens.__dataclass_fields__]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A tokenizer in which every word and every blank line is one token."""
    vocabulary = {word: i for i, word in enumerate(["?", "\n\n", *TEXT.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in MARKED])
    return tokenizer


def build(
    tokenizer: Tokenizer, turns: list[tuple[str, str]], form: PromptForm, **options: object
) -> Prompt:
    """Every mark is one frame."""
    messages = [Message(role, content) for role, content in turns]  # type: ignore[arg-type]
    marks = sum(m.content.count("<|video|>") + m.content.count("<|image|>") for m in messages)
    builder = PromptBuilder(tokenizer, SpecialTokens.from_tokenizer(tokenizer))
    settings = {"form": form, "sequence_length": 4096, **options}
    return builder.build(messages, [1] * marks, **settings)  # type: ignore[arg-type]


def spelled(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """The tokens with blanks between them; a label is in [brackets]."""
    said = []
    for token, label in zip(prompt.tokens, prompt.labels, strict=True):
        text = str(tokenizer.id_to_token(token)).strip("<|>").replace("\n\n", "NL")
        assert label in (token, -100)
        said.append(text if label == -100 else f"[{text}]")
    return " ".join(said)


def header(role: str) -> str:
    return f"start_header_id {role} end_header_id NL"


def test_pretrain(words: Tokenizer) -> None:
    turns = [("user", "<|video|>Who is it"), ("assistant", "A man sits")]
    expected = "begin_of_text image Who is it [A] [man] [sits] end_of_text"
    assert spelled(words, build(words, turns, "pretrain")) == expected


def test_chat(words: Tokenizer) -> None:
    turns = [
        ("system", "Be brief"),
        ("user", "<|image|>Who is it"),
        ("assistant", "He sits"),
        ("user", "Who"),
        ("assistant", "A man"),
    ]
    assert spelled(words, build(words, turns, "chat")) == (
        f"begin_of_text {header('system')} Be brief eot_id "
        f"{header('user')} image Who is it eot_id {header('assistant')} [He] [sits] [eot_id] "
        f"{header('user')} Who eot_id {header('assistant')} [A] [man] [eot_id]"
    )


REALTIME = [
    ("user", ""),
    (
        "assistant",
        "<|silence|><|video|><|silence|><|video|>A man walks in<|video|> and sits down ."
        "<|silence|><|video|><|silence|>",
    ),
    ("user", "Who is it"),
    ("assistant", "A<|video|> man<|video|> .<|...|><|video|><|silence|><|video|>"),
    ("user", ""),
    ("assistant", "<|video|>He sits<|video|>"),
]


def test_realtime(words: Tokenizer) -> None:
    """An empty first user turn; frames and the ends of turns are no labels, silence is one."""
    assert spelled(words, build(words, REALTIME, "realtime")) == (
        f"begin_of_text {header('user')} eot_id {header('assistant')} "
        "[silence] image [silence] image [A] [man] [walks] [in] image [and] [sits] [down] [.] "
        f"[silence] image [silence] eot_id {header('user')} Who is it eot_id "
        f"{header('assistant')} [A] image [man] image [.] [...] image [silence] image eot_id "
        f"{header('user')} eot_id {header('assistant')} image [He] [sits] image eot_id"
    )


def test_frames_swap_with_the_words_before_them_only(words: Tokenizer) -> None:
    """Not after a silence, and not in the two positions after a header."""
    always = build(words, REALTIME, "realtime", swap_probability=1.0, draws=random.Random(0))
    assert spelled(words, always) == (
        f"begin_of_text {header('user')} eot_id {header('assistant')} "
        "[silence] image [silence] image [A] [man] [walks] image [in] [and] [sits] [down] [.] "
        f"[silence] image [silence] eot_id {header('user')} Who is it eot_id "
        f"{header('assistant')} [A] image image [man] [.] image [...] [silence] image eot_id "
        f"{header('user')} eot_id {header('assistant')} image [He] image [sits] eot_id"
    )
    plain = build(words, REALTIME, "realtime", swap_probability=0.0, draws=random.Random(0))
    assert plain.tokens == build(words, REALTIME, "realtime", swap_probability=1.0).tokens


@pytest.mark.parametrize("form", ["chat", "pretrain"])
def test_only_realtime_prompts_swap(words: Tokenizer, form: PromptForm) -> None:
    turns = [("user", "<|video|>Who"), ("assistant", "A man sits<|image|> down")]
    still = build(words, turns, form)
    swapped = build(words, turns, form, swap_probability=1.0, draws=random.Random(0))
    assert swapped == still


def test_a_users_frames_do_not_swap(words: Tokenizer) -> None:
    turns = [("user", "Who is it<|video|> in"), ("assistant", "A man")]
    swapped = build(words, turns, "realtime", swap_probability=1.0, draws=random.Random(0))
    assert swapped == build(words, turns, "realtime")


def test_each_spot_swaps_half_of_the_time_and_alone(words: Tokenizer) -> None:
    """Three spots in 4,000 draws: all eight outcomes are equally often there."""
    turns = [("user", ""), ("assistant", "A man sits<|video|> down<|video|> and walks<|video|>")]
    still = build(words, turns, "realtime").frame_positions
    seen: Counter[tuple[int, ...]] = Counter()
    for i in range(4000):
        draws = random.Random(f"7 key {i}")
        prompt = build(words, turns, "realtime", swap_probability=0.5, draws=draws)
        seen[tuple(a - b for a, b in zip(still, prompt.frame_positions, strict=True))] += 1
    assert len(seen) == 8
    # Each is binomial(4000, 1/8): 500 with a deviation of 21.
    assert all(abs(count - 500) < 5 * 21 for count in seen.values()), seen


@given(st.data())
def test_a_cut_after_swaps_keeps_marks_and_frames_together(
    words: Tokenizer, data: st.DataObject
) -> None:
    pieces = st.sampled_from(["A ", "man ", "<|silence|>", "<|video|>", "<|...|>"])
    content = "".join(data.draw(st.lists(pieces, min_size=1, max_size=20)))
    turns = [("user", "Who"), ("assistant", "He " + content)]
    length, seed = data.draw(st.integers(12, 40)), data.draw(st.integers(0, 99))
    whole = build(words, turns, "realtime", swap_probability=0.5, draws=random.Random(seed))
    cut = build(
        words, turns, "realtime",
        sequence_length=length, swap_probability=0.5, draws=random.Random(seed),
    )  # fmt: skip
    image = words.token_to_id("<|image|>")
    assert (cut.tokens, cut.labels) == (whole.tokens[:length], whole.labels[:length])
    assert cut.frame_positions == [i for i, token in enumerate(cut.tokens) if token == image]
    assert len(whole.frame_positions) == content.count("<|video|>")
    assert cut.truncated == (len(whole.tokens) > length)


def test_the_golden_conversation(words: Tokenizer, real_files: Path) -> None:
    """Written out from the file's first record; words that the tokenizer does not have are `?`."""
    record = json.loads((real_files / "realtime_sharegpt_sample.json").read_text())[0]
    turns = [(m["role"], m["content"]) for m in record["messages"]]
    said = spelled(words, build(words, turns, "realtime"))
    answer = said.rsplit(f"{header('assistant')} ", 1)[1].replace("[?] ", "w")
    silent = "[silence] image [silence] image [silence]"
    assert f"{header('user')} eot_id {header('assistant')} {silent} eot_id" in said
    assert answer == (
        "image [A] wwwwwimage wwwimage wwwwww[and] wwimage [silence] image wwwwww[is] [in] ww"
        "[silence] image [silence] image [silence] image [silence] image [silence] eot_id"
    )
    always = build(words, turns, "realtime", swap_probability=1.0, draws=random.Random(0))
    answer = spelled(words, always).rsplit(f"{header('assistant')} ", 1)[1].replace("[?] ", "w")
    assert answer.startswith("image [A] wwwwimage wwwimage wwwwwww[and] wimage w[silence] ")
