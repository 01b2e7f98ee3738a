"""Every option of `generate` gives the tokens of plain passes without a cache, or is refused; a row
of a batch computes what it computes alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.inference.hf.test_modeling import batch_of_two
from tests.inference.tiny import tiny_model

IMAGE = 512


def inputs_of(kind: str) -> dict[str, Tensor]:
    tokens, pixels = batch_of_two()
    if kind == "text":
        return {"input_ids": tokens[:1].masked_fill(tokens[:1] == IMAGE, 9)}
    return {"input_ids": tokens[:1], "pixel_values": pixels[:1]}


@torch.no_grad()
def greedy(
    model,
    inputs: dict[str, Tensor],
    count: int,
    change: Callable[[Tensor, list[int]], None] = lambda *_: None,
) -> list[int]:
    """The likeliest tokens, each from a pass over everything before it.

    change: of scores, given the tokens so far.
    """
    ids, made = inputs["input_ids"], []
    for _ in range(count):
        scores = model(**{**inputs, "input_ids": ids}, use_cache=False).logits[0, -1]
        change(scores, ids[0].tolist())
        best = scores.argmax()
        made.append(int(best))
        ids = torch.cat((ids, best.view(1, 1)), dim=1)
    return made


OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_cache": False},
    {"cache_implementation": "dynamic"},
    {"past_key_values": "DynamicCache"},
    {"cache_implementation": "hybrid"},
    {"num_beams": 1, "num_return_sequences": 1},
    {"prompt_lookup_num_tokens": 3},
    {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    {"repetition_penalty": 1.0, "min_new_tokens": 2},
    {"return_dict_in_generate": True, "output_hidden_states": True},
    {"return_dict_in_generate": True, "output_attentions": True},
]


@pytest.mark.parametrize("kind", ["text", "frames"])
@pytest.mark.parametrize("rows", ["zero", "attend_all"])
def test_options_that_are_taken_give_the_same_tokens(kind, rows):
    model, inputs = tiny_model(tokens_before_first_frame=rows), inputs_of(kind)
    # What was said before repeats itself: candidates of a prompt look-up are taken back.
    wanted = greedy(model, inputs, 8)
    for options in OPTIONS:
        given = dict(options)
        if "past_key_values" in given:
            given["past_key_values"] = DynamicCache()
        made = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, **given
        )
        made = made if isinstance(made, Tensor) else made.sequences
        assert made[0, inputs["input_ids"].shape[1] :].tolist() == wanted, options


def frames_after_the_end() -> dict[str, Tensor]:
    """What the text ends with stands before each frame, too, as the header of a turn does."""
    ids = torch.tensor([[54, 10, 11, IMAGE, 33, 10, 11, IMAGE, IMAGE, 44, 10, 11]])
    return {"input_ids": ids, "pixel_values": batch_of_two()[1][:1]}


def penalty(by: float, own: list[int] | None) -> Callable[[Tensor, list[int]], None]:
    """Divides scores above 0 of tokens that were there, multiplies others; `own`: those alone."""

    def change(scores: Tensor, ids: list[int]) -> None:
        for token in set(ids if own is None else own) - {IMAGE}:
            scores[token] = scores[token] / by if scores[token] > 0 else scores[token] * by

    return change


def no_pair(own: list[int] | None) -> Callable[[Tensor, list[int]], None]:
    """Forbids tokens that came after the last one before."""

    def change(scores: Tensor, ids: list[int]) -> None:
        before = ids if own is None else own
        for first, second in pairwise(before):
            if first == ids[-1] and second != IMAGE:
                scores[second] = -torch.inf

    return change


@pytest.mark.parametrize(
    ("options", "rule", "of_prompt"),
    [
        ({"repetition_penalty": 1.5}, partial(penalty, 1.5), False),
        ({"encoder_repetition_penalty": 4.0}, partial(penalty, 1 / 4.0), True),
        ({"no_repeat_ngram_size": 2}, no_pair, False),
        ({"encoder_no_repeat_ngram_size": 2}, no_pair, True),
    ],
)
@pytest.mark.parametrize("beams", [1, 3])
def test_rules_about_the_prompts_tokens_pass_by_frames(options, rule, of_prompt, beams):
    """`<|image|>` has no score, and needs none."""
    model, inputs = tiny_model(), frames_after_the_end()
    prompt = inputs["input_ids"][0].tolist()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **options}
    made = model.generate(**inputs, num_beams=beams, **settings)[0, len(prompt) :].tolist()
    if beams == 1:
        assert made == greedy(model, inputs, 8, rule(prompt if of_prompt else None))
    assert len(made) == 8


def test_candidates_from_the_prompt_have_no_frames():
    """What follows its end there is a frame, which the model does not say."""
    model, inputs = tiny_model(), frames_after_the_end()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    made = model.generate(**inputs, prompt_lookup_num_tokens=3, **settings)
    assert made[0, 12:].tolist() == greedy(model, inputs, 8)
    made = model.generate(**inputs, prompt_lookup_num_tokens=3, no_repeat_ngram_size=2, **settings)
    assert made[0, 12:].tolist() == greedy(model, inputs, 8, no_pair(None))


@pytest.mark.parametrize("kind", ["text", "frames"])
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded_static"},
        {"past_key_values": "StaticCache"},
        {"prefill_chunk_size": 4},
    ],
)
def test_options_that_cannot_be_taken_are_refused(kind, options):
    model, inputs = tiny_model(), inputs_of(kind)
    if "prefill_chunk_size" in options and kind == "text":
        pytest.skip("text in pieces is taken")
    without_driver = torch.version.cuda is not None and not torch.cuda.is_available()
    if options.get("cache_implementation") == "offloaded_static" and without_driver:
        pytest.skip("transformers asks CUDA for a stream before the model sees the cache")
    given = dict(options)
    if "past_key_values" in given:
        given["past_key_values"] = StaticCache(model.config.get_text_config(), max_cache_len=64)
    with pytest.raises((ValueError, KeyError)) as caught:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, **given)
    assert str(caught.value)


@pytest.mark.parametrize("rows", ["zero", "attend_all"])
def test_a_row_of_a_batch_computes_what_it_computes_alone(rows):
    """Two rows with frames, three and one, and one without, padded on the left."""
    model = tiny_model(tokens_before_first_frame=rows)
    tokens, pixels = batch_of_two()
    text = tokens[1, :9].masked_fill(tokens[1, :9] == IMAGE, 9)
    alone = [
        {"input_ids": tokens[:1], "pixel_values": pixels[:1]},
        {"input_ids": tokens[1:, :10], "pixel_values": pixels[1:, :1]},
        {"input_ids": text[None]},
    ]
    lengths = [inputs["input_ids"].shape[1] for inputs in alone]
    ids, mask = torch.full((3, 12), 7), torch.zeros(3, 12, dtype=torch.long)
    for n, inputs in enumerate(alone):
        ids[n, -lengths[n] :], mask[n, -lengths[n] :] = inputs["input_ids"][0], 1
    ratios = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    pixels = torch.cat((pixels, torch.zeros_like(pixels[:1])))
    batch = {
        "input_ids": ids, "attention_mask": mask, "pixel_values": pixels,
        "aspect_ratio_ids": ratios,
    }  # fmt: skip
    with torch.no_grad():
        together = model(**batch).logits
    made = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 12:]
    for n, inputs in enumerate(alone):
        with torch.no_grad():
            wanted = model(**inputs).logits[0]
        torch.testing.assert_close(together[n, -lengths[n] :], wanted, atol=1e-4, rtol=0)
        assert made[n].tolist() == greedy(model, inputs, 6)


def test_frames_and_marks_must_be_as_many():
    tokens, pixels = batch_of_two()
    model = tiny_model()
    states = model.get_image_features(pixels)
    for cut in (3, 4, 9):
        for frames in ({"pixel_values": pixels}, {"cross_attention_states": states}):
            row = {name: tensor[:1] for name, tensor in frames.items()}
            with pytest.raises(ValueError, match=r"<\|image\|> tokens, but \[3\] frames"):
                model(input_ids=tokens[:1, cut:], **row)
    with pytest.raises(ValueError, match="pixels_values: this model has no such"):
        model(input_ids=tokens, pixels_values=[1])


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 64}])
def test_a_resized_model_is_saved_as_it_loads(options, tmp_path):
    model, inputs = tiny_model(), inputs_of("frames")
    with torch.no_grad():
        before = model(**inputs).logits
    model.resize_token_embeddings(525, mean_resizing=False, **options)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    rows = 576 if options else 525
    assert again.lm_head.weight.shape[0] == rows == again.config.text_config.vocab_size
    assert again.get_input_embeddings().weight.shape[0] == rows + 8
    with torch.no_grad():
        after = again(**inputs).logits
    torch.testing.assert_close(after[..., : before.shape[-1]], before, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="needs a row: at least 505"):
        model.resize_token_embeddings(300)


def test_marks_without_frames_are_refused_unless_it_is_meant():
    model, inputs = tiny_model(), inputs_of("frames")
    draft, wanted = tiny_model(), greedy(model, inputs, 6)
    with pytest.raises(ValueError, match=r"\[3\] <\|image\|> tokens, but \[0\] frames"):
        model(input_ids=inputs["input_ids"])
    with torch.no_grad():  # as an evaluation does that shows nothing
        assert model(input_ids=inputs["input_ids"], marks_alone=True).logits.shape[1] == 12
    made = model.generate(
        **inputs, assistant_model=draft, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert made[0, 12:].tolist() == wanted


@pytest.mark.parametrize("given", ["those of the turn", "all"])
@pytest.mark.parametrize("way", ["plain", "candidates", "embeddings"])
def test_a_turn_that_goes_on_from_a_cache_sees_its_frames(given, way):
    """The second turn has the third frame."""
    model, inputs = tiny_model(), inputs_of("frames")
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    first = model.generate(
        input_ids=ids[:, :5], pixel_values=pixels[:, :2], max_new_tokens=3,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    ids = torch.cat((first.sequences, ids[:, 5:]), dim=1)
    wanted = greedy(model, {"input_ids": ids, "pixel_values": pixels}, 5)
    frames = pixels if given == "all" else pixels[:, 2:]
    cache = first.past_key_values
    for wrong in (None, pixels[:, 1:]):
        with pytest.raises(ValueError, match=r"\[1\] <\|image\|> tokens, but \[[02]\] frames"):
            model.generate(input_ids=ids, pixel_values=wrong, past_key_values=cache, **options)
    if way == "candidates":
        options["prompt_lookup_num_tokens"] = 2
    if way == "embeddings":
        options["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    made = model.generate(
        input_ids=ids, pixel_values=frames, past_key_values=cache, max_new_tokens=5, **options
    )
    assert made[0, ids.shape[1] :].tolist() == wanted


@pytest.mark.parametrize("way", ["cache", "no cache", "candidates", "assistant"])
def test_tokens_that_are_said_see_what_the_last_one_of_a_frame_mask_sees(way):
    """As transformers' Mllama has it. The second frame is hidden."""
    model, inputs = tiny_model(tokens_before_first_frame="attend_all"), frames_after_the_end()
    seen = torch.zeros(1, 12, 3, 1, dtype=torch.long)
    for frame, place in ((0, 3), (2, 8)):
        seen[:, place:, frame] = 1
    ids, wanted = inputs["input_ids"], list[int]()
    with torch.no_grad():
        for _ in range(6):
            rows = torch.cat((seen, seen[:, -1:].expand(-1, len(wanted), -1, -1)), dim=1)
            frames = {"pixel_values": inputs["pixel_values"], "cross_attention_mask": rows}
            wanted.append(int(model(input_ids=ids, **frames).logits[0, -1].argmax()))
            ids = torch.cat((ids, torch.tensor([wanted[-1:]])), dim=1)
    assert wanted != greedy(model, inputs, 6)
    ways: dict[str, dict[str, Any]] = {
        "cache": {},
        "no cache": {"use_cache": False},
        "candidates": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": model},
    }
    made = model.generate(
        **inputs, cross_attention_mask=seen, max_new_tokens=6, do_sample=False, eos_token_id=None,
        **ways[way],
    )  # fmt: skip
    assert made[0, 12:].tolist() == wanted


def test_masks_and_positions_of_another_form_are_refused():
    model, inputs = tiny_model(), inputs_of("frames")
    length = inputs["input_ids"].shape[1]
    causal = torch.ones(length, length).tril()[None, None]
    with torch.no_grad():
        wanted = model(**inputs).logits
        for mask in (causal.bool(), causal.long(), (1 - causal) * torch.finfo(torch.float32).min):
            made = model(**inputs, attention_mask=mask).logits
            torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0)
        past = model(**inputs, use_cache=True).past_key_values
    one = {"input_ids": torch.tensor([[5]]), "past_key_values": past}
    frames = torch.ones(1, length, 3, 1)
    for given, says in (
        ({**inputs, "attention_mask": causal}, "of floats, which are added"),
        ({**inputs, "attention_mask": causal[0]}, r"attention_mask: \[1, 12, 12\]"),
        ({**one, "attention_mask": torch.ones(1, 1)}, r"\[1, 1\] for 1 tokens after 12"),
        ({**inputs, "position_ids": torch.zeros(1, 1).long()}, r"position_ids: \[1, 1\]"),
        ({**inputs, "cross_attention_mask": frames.expand(-1, -1, -1, 4)}, r"\[1, 12, 3, 4\]"),
        ({**inputs, "cross_attention_mask": frames[:, :, :2]}, r"\[1, 12, 2, 1\]"),
        ({**inputs, "cross_attention_mask": frames - 2}, "1 where a token sees a tile"),
    ):
        with pytest.raises(ValueError, match=says):
            model(**given)


def repeated(cache: DynamicCache) -> None:
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [lambda cache: cache.reorder_cache(torch.tensor([1, 1])), repeated]
)
def test_rows_of_a_cache_that_change_places_take_their_frames_along(change):
    """Three frames in one row, one in the other: both go on as the second."""
    model = tiny_model()
    tokens, pixels = batch_of_two()
    ratios = torch.tensor([[1, 1, 1], [1, 0, 0]])
    inputs = {"input_ids": tokens, "pixel_values": pixels, "aspect_ratio_ids": ratios}
    cache = model(**inputs, use_cache=True).past_key_values
    change(cache)
    got = model(input_ids=torch.tensor([[9], [9]]), past_key_values=cache).logits
    ids = torch.cat((tokens[1:], torch.tensor([[9]])), dim=1)
    wanted = model(input_ids=ids, pixel_values=pixels[1:, :1]).logits[:, -1:]
    torch.testing.assert_close(got, wanted.expand(2, -1, -1), atol=1e-4, rtol=0)


def test_a_pass_over_nothing_is_refused():
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        tiny_model()()
