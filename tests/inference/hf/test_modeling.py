"""The model for transformers against the published modules' numbers and transformers' Mllama."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from inference.hf.configuration_moss_video import MossVideoConfig
from inference.hf.model_moss_video import OLD_NAMES
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from tests.golden import make_mllama
from tests.inference.tiny import generated_logits, tiny_model

CASES = ("image", "video", "video_padded", "realtime")


def new_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = re.sub(old, new, name)
    return name


def gradient_errors(model: torch.nn.Module, wanted: dict[str, Tensor]) -> dict[str, float]:
    """Of each parameter in `wanted`: norm of the difference / norm of the gradient."""
    got = {name: p.grad for name, p in model.named_parameters()}
    return {
        name: ((got[name] - grad).norm() / grad.norm()).item()  # type: ignore[operator]
        for name, grad in wanted.items()
    }


@pytest.fixture(scope="module")
def golden(shared: Path) -> MossVideoForConditionalGeneration:
    return MossVideoForConditionalGeneration.from_pretrained(shared / "golden").eval()


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_modules(name: str, shared: Path, golden) -> None:
    case = load_file(shared / "golden" / f"{name}.safetensors")
    golden.zero_grad()
    # Positions and masks are derived from the <|image|> tokens.
    out = golden(
        input_ids=case["input_ids"],
        attention_mask=case["attention_mask"],
        pixel_values=case["pixel_values"],
        aspect_ratio_ids=case["aspect_ratio_ids"],
        labels=case["labels"],
    )
    real = case["attention_mask"].bool()
    assert (out.logits - case["logits"])[real].abs().max() < 1e-4
    assert (out.loss - case["loss"]).abs() < 1e-5
    out.loss.backward()
    wanted = {new_name(k[5:]): v for k, v in case.items() if k.startswith("grad.")}
    assert len(wanted) == 24
    assert max(gradient_errors(golden, wanted).values()) < 1e-3


@pytest.mark.parametrize("name", ["image", "video", "realtime"])
def test_generates_the_published_tokens(name: str, shared: Path, golden) -> None:
    case = load_file(shared / "golden" / f"{name}.safetensors")
    length = int(case["attention_mask"][0].sum())
    out = golden.generate(
        input_ids=case["input_ids"][:1, :length],
        pixel_values=case["pixel_values"][:1],
        max_new_tokens=len(case["greedy"]),
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(out[0, length:], case["greedy"])


def test_loading_and_saving_keeps_names_and_bits(shared: Path, golden, tmp_path: Path) -> None:
    golden.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    wanted = load_file(shared / "golden" / "model.safetensors")
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def mllama():
    """transformers' own Mllama, our model with its weights, and a batch: five images of one to
    four tiles in two rows of unequal length."""
    torch.manual_seed(5)
    theirs = make_mllama.make_model()
    ours = MossVideoForConditionalGeneration(MossVideoConfig(**make_mllama.CONFIG)).eval()
    ours.load_state_dict(theirs.state_dict())  # the same names
    return theirs, ours, make_mllama.make_batch()


def test_plain_mllama_equals_transformers(mllama) -> None:
    theirs, ours, batch = mllama
    wanted, got = theirs(**batch), ours(**batch)
    assert wanted.logits.abs().max() > 1
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], wanted.logits[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(got.loss, wanted.loss, atol=1e-5, rtol=0)
    wanted.loss.backward()
    got.loss.backward()
    # Some are zero by the form of the model, e.g. of tiles that do not occur.
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad.abs().max() > 1e-6}
    assert len(grads) > 90
    assert max(gradient_errors(ours, grads).values()) < 1e-3


def test_intermediate_states_come_in_the_order_of_their_layers(mllama) -> None:
    """transformers joins them as config.json lists them."""
    theirs, ours, batch = mllama
    lists = (
        (theirs.model.vision_model, "intermediate_layers_indices"),
        (
            ours.model.vision_model,
            "intermediate",
        ),
    )
    kept = [getattr(*place) for place in lists]
    for (tower, name), layers in zip(lists, kept, strict=True):
        setattr(tower, name, list(reversed(layers)))
    try:
        with torch.no_grad():
            wanted, got = theirs(**batch).logits, ours(**batch).logits
    finally:
        for (tower, name), layers in zip(lists, kept, strict=True):
            setattr(tower, name, layers)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], wanted[real], atol=1e-4, rtol=0)


def test_plain_mllama_generates_what_transformers_does(mllama) -> None:
    theirs, ours, batch = mllama
    inputs = {k: v[:1] for k, v in batch.items() if k != "labels"}
    for options in ({"do_sample": False}, {"num_beams": 3}):
        wanted = theirs.generate(**inputs, max_new_tokens=12, eos_token_id=None, **options)
        got = ours.generate(**inputs, max_new_tokens=12, eos_token_id=None, **options)
        assert torch.equal(got, wanted)


def batch_of_two(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two rows, three frames and one, without padding: tokens `[2, S]`, frames `[2, 3, ...]`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, 250, (2, 12), generator=generator)
    tokens[0, [2, 3, 8]] = 512
    tokens[1, 5] = 512
    pixels = torch.randn(2, 3, 1, 3, 56, 56, generator=generator)
    pixels[1, 1:] = 0
    return tokens, pixels


def test_rows_padded_on_the_left_generate_as_alone() -> None:
    model, (tokens, pixels) = tiny_model(), batch_of_two()
    short = tokens[1:, :8]
    padded = torch.cat((torch.full((1, 4), 7), short), dim=1)
    ids = torch.cat((tokens[:1], padded))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    together = generated_logits(model, input_ids=ids, attention_mask=mask, pixel_values=pixels)
    for row, alone in ((0, tokens[:1]), (1, short)):
        frames = pixels[row : row + 1, : 3 - 2 * row]
        wanted = generated_logits(model, input_ids=alone, pixel_values=frames)
        torch.testing.assert_close(together[:, row], wanted[:, 0], atol=1e-4, rtol=0)


def test_frames_that_arrive_later_join_those_in_the_cache() -> None:
    model, (tokens, pixels) = tiny_model(), batch_of_two()
    tokens, pixels = tokens[:1], pixels[:1]
    with torch.no_grad():
        whole = model(input_ids=tokens, pixel_values=pixels).logits
        first = model(input_ids=tokens[:, :5], pixel_values=pixels[:, :2], use_cache=True)
        second = model(
            input_ids=tokens[:, 5:10],
            pixel_values=pixels[:, 2:],
            past_key_values=first.past_key_values,
        )
        third = model(input_ids=tokens[:, 10:], past_key_values=second.past_key_values)
    parts = torch.cat((first.logits, second.logits, third.logits), dim=1)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_tokens_before_the_first_frame_see_nothing_or_all_frames() -> None:
    tokens, pixels = batch_of_two()
    blind = slice(0, 2)  # before the first frame of row 0
    logits = {}
    for rows in ("zero", "attend_all"):
        model = tiny_model(tokens_before_first_frame=rows)
        with torch.no_grad():
            logits[rows] = model(input_ids=tokens[:1], pixel_values=pixels[:1]).logits
            text = model(input_ids=tokens[:1, blind]).logits
    torch.testing.assert_close(logits["zero"][:, blind], text, atol=1e-5, rtol=0)
    assert (logits["attend_all"][:, blind] - text).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["none", "max", "bilinear", "channel_fusion"])
def test_pooling_commutes_with_joining_states(mode: str) -> None:
    """Against pooling what is already joined, as the published code does."""
    from torch.nn.functional import interpolate, max_pool2d

    model = tiny_model(pool_mode=mode, pool_stride=1 if mode == "none" else 2)
    pixels = batch_of_two()[1][:1, 0]  # [1, T, 3, h, w]
    ones = torch.ones(1, dtype=torch.long)
    with torch.no_grad():
        got = model.model.encode(pixels, ones, torch.ones(1, 1, dtype=torch.bool))
        final, *rest = model.model.vision_model(pixels, ones, torch.ones(1, 1).bool())
        joined = torch.cat((final, torch.stack(rest, -1).flatten(-2)), -1)[0, 0]  # [17, D]
        grid = joined[1:].T.unflatten(1, (4, 4))[None]  # [1, D, 4, 4]
        pooled = {
            "none": lambda: grid,
            "max": lambda: max_pool2d(grid, 2),
            "bilinear": lambda: interpolate(grid, size=(2, 2), mode="bilinear"),
            "channel_fusion": lambda: model.model.patch_merger(grid),  # type: ignore[misc]
        }[mode]()
        wanted = torch.cat((joined[:1], pooled[0].flatten(1).T))
        wanted = model.model.multi_modal_projector(wanted)
    torch.testing.assert_close(got[0], wanted, atol=1e-5, rtol=1e-5)


def test_more_marks_than_frames_is_an_error() -> None:
    tokens, pixels = batch_of_two()
    with pytest.raises(ValueError, match=r"have \[3\] <.image.> tokens, but \[2\] frames"):
        tiny_model()(input_ids=tokens[:1], pixel_values=pixels[:1, :2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_mode": "mean"}, "pool_mode 'mean'"),
        ({"tokens_before_first_frame": "none"}, "tokens_before_first_frame 'none'"),
    ],
)
def test_wrong_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**changes)


def test_the_config_of_an_export_of_an_earlier_version_is_read() -> None:
    assert MossVideoConfig(blind_rows="zero").tokens_before_first_frame == "zero"
    assert not hasattr(MossVideoConfig(blind_rows="zero"), "blind_rows")


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}])
def test_gradients_of_layers_that_are_run_again_are_the_same(options):
    model, (tokens, pixels) = tiny_model().train(), batch_of_two()
    inputs = {"input_ids": tokens, "pixel_values": pixels, "labels": tokens}

    runs = []
    for layer in (*model.model.language_model.layers, *model.model.vision_model.transformer.layers):
        layer.input_layernorm.register_forward_hook(lambda *_: runs.append(1))

    def gradients() -> dict[str, Tensor]:
        runs.clear()
        model.zero_grad()
        model(**inputs).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted, once = gradients(), len(runs)
    model.gradient_checkpointing_enable(options)
    got = gradients()
    assert len(runs) == 2 * once
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, msg=name)
    assert model(**inputs, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values: not with"):
        model(**inputs, past_key_values=DynamicCache())
    model.eval()
    assert model(**inputs, use_cache=True).past_key_values is not None  # where nothing runs again
    model.train().gradient_checkpointing_disable()
    gradients()
    assert len(runs) == once
