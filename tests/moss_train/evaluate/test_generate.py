"""Generation, held to passes over the finished conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from data_pipeline.schema import parse_sample
from moss_train.data_config import CONTROLS
from moss_train.evaluate.controls import ONE_FRAME, SHUFFLED, ModelInput, frame_order, watch
from moss_train.evaluate.generate import (
    SPEAK,
    GeneratedConversation,
    answer_start,
    answers,
    generate,
    predictions,
    stream_script,
    streams,
)
from moss_train.evaluate.items import Item, make_item
from moss_train.evaluate.model import TrainedModel
from moss_train.evaluate.replica import text_batch
from moss_train.parallel.schedule import run_logits


def talk(
    model: TrainedModel, item: Item, script: list, most: int, blind: bool = False
) -> GeneratedConversation:
    (states,) = model.encode([item.encoded])
    special = model.encoder.special
    ends = {special.eot_id, special.silence}
    return GeneratedConversation(script, states, item.encoded.aspect_ratio_ids, ends, most, blind)


def test_every_word_is_the_likeliest_after_all_before_it(model, live) -> None:
    """The tokens said are the argmax of one pass over the finished conversation."""
    talks = [talk(model, item, stream_script(model, item.sample), 4) for item in live]
    talks += [talk(model, live[0], stream_script(model, live[0].sample), 4, blind=True)]
    generate(model, talks)
    spoken = 0
    for done in talks:
        ((said, _),) = model.predict([done.input])
        likely = said.tolist()
        at = 0
        for said in done.utterances:
            while done.tokens[at : at + len(said)] != said or likely[at - 1] != said[0]:
                at += 1
            assert likely[at - 1 : at - 1 + len(said)] == said
            assert len(said) == 4 or said[-1] in done.ends
            at += len(said)
            spoken += len(said)
    assert spoken > 200


class Reciter:
    """Says what the sample has, token by token."""

    def __init__(self, model: TrainedModel, item: Item) -> None:
        self.tokenizer, self.encoder, self.encode = model.tokenizer, model.encoder, model.encode
        self._tokens = item.encoded.tokens.tolist()

    def next_tokens(self, inputs: Sequence[ModelInput]) -> list[int]:
        return [self._tokens[len(one.tokens)] for one in inputs]

    def predict(self, inputs: Sequence[ModelInput]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        raise NotImplementedError


def test_a_long_answer_is_said_whole(model, questions) -> None:
    """Cut off, it would count as wrong, whoever says it."""
    item = questions[0]
    turns = [{"role": "user", "content": "Tell all."},
             {"role": "assistant", "content": "red circle left " * 60}]  # fmt: skip
    line = json.dumps({"kind": "chat", "messages": turns, "media": []}).encode()
    long = make_item("sft/text", "long", {"json": line}, model.encoder)
    for one in (item, long):
        (said,) = answers(Reciter(model, one), watch(model, [one]))
        assert said == one.answer
    assert len(long.encoded.tokens) > 150


def test_answers_do_not_depend_on_the_neighbours(model, questions) -> None:
    watched = watch(model, questions)
    together = answers(model, watched, most=5)
    assert together == [answers(model, [seen], most=5)[0] for seen in watched]
    assert len(set(together)) > 3


def test_frames_change_answers_and_controls_change_what_is_seen(model, questions) -> None:
    clips, texts = watch(model, questions[:6]), watch(model, questions[8:])
    seen = answers(model, clips, most=5)
    for control in CONTROLS:
        assert answers(model, [clip.under(control) for clip in clips], most=5) != seen
        assert [text.under(control) is text for text in texts] == [True, True]


def test_controls_show_the_middle_frame_or_all_in_another_order(model, questions) -> None:
    (clip,) = watch(model, questions[:1])
    count = len(clip.states)
    assert count > 2
    shuffled, frozen = clip.under(SHUFFLED), clip.under(ONE_FRAME)
    assert torch.equal(frozen.states, clip.states[count // 2].expand_as(clip.states))
    order = frame_order(count, clip.item.key, SHUFFLED)
    assert sorted(order) == list(range(count)) != order
    assert torch.equal(shuffled.states, clip.states[torch.tensor(order)])
    assert frame_order(count, f"elsewhere/{clip.item.key}", SHUFFLED) == order
    assert frame_order(2, "any", SHUFFLED) == [1, 0]


def test_the_answer_starts_behind_its_header(model, questions) -> None:
    for item in questions:
        start, tokens = answer_start(item), item.encoded.tokens.tolist()
        end = tokens.index(model.encoder.special.eot_id, start)
        assert model.tokenizer.decode(tokens[start:end]) == item.sample.messages[1].content
        assert end == len(tokens) - 1


def test_probabilities_are_those_of_the_tokens(model, questions) -> None:
    item = questions[0]
    tokens, places = item.encoded.tokens.tolist(), item.encoded.frame_positions.tolist()
    (state,), ratios = model.encode([item.encoded]), item.encoded.aspect_ratio_ids
    inputs = [ModelInput(tokens, places, state, ratios)]
    batch = text_batch(inputs, len(tokens))
    (logits,) = run_logits(model.chunks, model.plan([batch], inputs))
    likely, chances = predictions(model, watch(model, questions))[0]
    assert likely.tolist() == logits.argmax(-1).tolist()
    last = logits[-2].double().softmax(-1)[tokens[-1]].log().item()
    assert abs(chances[-1].item() - last) < 1e-4


def test_a_stream_is_its_sample_with_the_model_s_words(model) -> None:
    messages = [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "<|video|><|silence|><|video|>A dog.<|silence|>"},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "There.<|silence|><|video|><|silence|>"},
    ]
    media = [{"type": "video", "file": "0.mp4"}]
    sample = parse_sample("k", {"messages": messages, "media": media, "kind": "realtime"})
    script, image = stream_script(model, sample), model.encoder.special.image
    turns = [step if step in (SPEAK, image) else "text" for step in script if step != []]
    watch, answer = [image, SPEAK], [SPEAK]
    assert turns[4:] == [*watch, *watch, *["text"] * 4, *answer, *watch, "text"]
    given = [token for step in script if isinstance(step, list) for token in step]
    decoded = model.tokenizer.decode(given, skip_special_tokens=False)
    assert "user<|end_header_id|>\n\nWhere?<|eot_id|>" in decoded


def test_streams_say_in_which_second(model, live) -> None:
    for item, said in zip(live, streams(model, watch(model, live), most=3), strict=True):
        seconds = [second for second, _ in said]
        assert seconds == sorted(set(seconds))
        assert all(0 <= second < len(item.encoded.frames) for second in seconds)
