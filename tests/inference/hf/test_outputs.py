"""What a pass gives beside logits, and the model without its head: as transformers' own Mllama."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from transformers.utils.generic import find_labels

from inference.hf.configuration_moss_video import MossVideoConfig
from inference.hf.model_moss_video import BARE_NAMES, MossVideoModel
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from tests.golden import make_mllama
from tests.inference.hf.test_modeling import batch_of_two
from tests.inference.tiny import tiny_model

RECORDED = {"output_hidden_states": True, "output_attentions": True}


@pytest.fixture(scope="module")
def mllama():
    """transformers' own Mllama, our model with its weights, and a batch of frames and padding."""
    torch.manual_seed(5)
    theirs = make_mllama.make_model().eval()
    theirs.set_attn_implementation("eager")  # others keep no attention
    ours = MossVideoForConditionalGeneration(MossVideoConfig(**make_mllama.CONFIG)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, make_mllama.make_batch()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["frames", "text"])
def test_states_and_attention_of_layers_are_those_of_transformers(kind, mllama):
    """Of text alone the layers of cross-attention do not run, and give none."""
    theirs, ours, batch = mllama
    real = batch["attention_mask"].bool()
    if kind == "text":
        ids = batch["input_ids"].masked_fill(batch["input_ids"] == ours.config.image_token_index, 3)
        batch = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    wanted, got = (model(**batch, **RECORDED) for model in (theirs, ours))
    assert len(got.hidden_states) == len(wanted.hidden_states) == (5 if kind == "frames" else 3)
    for mine, other in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(mine[real], other[real], atol=1e-4, rtol=0)
    for mine, other in zip(got.attentions, wanted.attentions, strict=True):
        mine, other = mine.transpose(1, 2)[real], other.transpose(1, 2)[real]
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_states_of_generation_are_those_of_a_pass_over_all():
    model = tiny_model()
    tokens, pixels = batch_of_two()
    inputs = {"input_ids": tokens[:1], "pixel_values": pixels[:1]}
    made = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_hidden_states=True,
    )  # fmt: skip
    length = tokens.shape[1]
    assert [step[-1].shape[1] for step in made.hidden_states] == [length, 1, 1, 1]
    inputs["input_ids"] = made.sequences[:, :-1]
    wanted = model(**inputs, **RECORDED).hidden_states
    for layer, whole in enumerate(wanted):
        steps = torch.cat([step[layer] for step in made.hidden_states], dim=1)
        torch.testing.assert_close(steps, whole, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_model_without_its_head_gives_the_last_states(mllama):
    theirs, ours, batch = mllama
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    wanted, got = theirs.model(**inputs), ours.base_model(**inputs, use_cache=False)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(
        got.last_hidden_state[real], wanted.last_hidden_state[real], atol=1e-4, rtol=0
    )
    assert got.past_key_values is None
    assert got.hidden_states is None


def test_transformers_4_finds_the_weights_of_the_model_without_its_head():
    """It renames each tensor of a file by the first pattern that matches, and takes off no prefix.
    Files have the names of transformers 4, those of 5, or were saved without the head."""
    model = tiny_model()
    wanted = set(model.model.state_dict())
    whole = set(model.state_dict())
    old = {
        name.removeprefix("model.").replace("language_model.", "language_model.model.")
        for name in whole - {"lm_head.weight"}
    }

    def renamed(name: str) -> str:
        found = (re.subn(pattern, new, name) for pattern, new in BARE_NAMES.items())
        return next((made for made, times in found if times), name)

    head = {"lm_head.weight"}
    assert {renamed(name) for name in old | {"language_model.lm_head.weight"}} == wanted | head
    assert {renamed(name) for name in whole} == wanted | head
    assert {renamed(name) for name in wanted} == wanted
    ignored = MossVideoModel._keys_to_ignore_on_load_unexpected
    assert isinstance(ignored, list)  # to which it adds one
    assert re.search(ignored[0], "lm_head.weight")


@torch.no_grad()
def test_settings_of_the_config_count_where_the_caller_says_nothing():
    model = tiny_model()
    tokens, pixels = batch_of_two()
    inputs = {"input_ids": tokens[:1], "pixel_values": pixels[:1]}
    plain = model(**inputs)
    assert plain.past_key_values is not None
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == 7
    assert model(**inputs, output_hidden_states=False).hidden_states is None
    model.config.use_cache = False
    assert model(**inputs).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values is not None
    logits, states = model(**inputs, return_dict=False)
    assert torch.equal(logits, plain.logits)
    assert len(states) == 7
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(**inputs, output_hidden_states=[1, 2])


@torch.no_grad()
def test_the_loss_is_of_all_labels_whatever_logits_are_kept():
    model = tiny_model()
    tokens, pixels = batch_of_two()
    inputs = {"input_ids": tokens, "pixel_values": pixels}
    whole = model(**inputs, labels=tokens)
    last = model(**inputs, labels=tokens, logits_to_keep=2)
    assert torch.equal(last.loss, whole.loss)
    assert torch.equal(last.logits, whole.logits[:, -2:])
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(**inputs, shift_labels=shifted).loss, whole.loss)


def test_a_trainer_finds_the_labels_that_it_evaluates_with():
    """transformers' reports an eval_loss where all inputs are there that are called labels."""
    assert find_labels(MossVideoForConditionalGeneration) == ["labels"]


@torch.no_grad()
def test_embeddings_in_place_of_tokens_give_the_same():
    model = tiny_model()
    tokens, pixels = batch_of_two()
    inputs = {"pixel_values": pixels[:1]}
    embeds = model.get_input_embeddings()(tokens[:1])
    wanted = model(input_ids=tokens[:1], **inputs).logits
    assert torch.equal(model(inputs_embeds=embeds, **inputs).logits, wanted)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    made = model.generate(input_ids=tokens[:1], **inputs, **options)[:, tokens.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, **options), made)


@pytest.mark.parametrize("kind", ["text", "frames"])
def test_a_graph_without_branches_upon_values(kind):
    """torch.export makes one, which computes the same and still counts frames."""
    model = copy.deepcopy(tiny_model())
    tokens, pixels = batch_of_two()
    tokens, given = tokens[:1], [pixels[:1]]
    if kind == "text":
        tokens, given = tokens.masked_fill(tokens == 512, 9), []

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids, *frames):
            shown = {"pixel_values": frames[0]} if frames else {}
            return self.inner(input_ids=ids, use_cache=False, **shown).logits

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.export.export(Logits(), (tokens, *given)).module()
        torch.testing.assert_close(graph(tokens, *given), Logits()(tokens, *given))
        with pytest.raises(RuntimeError, match=r"one <\|image\|> token for each frame"):
            graph(torch.full_like(tokens, 512), *given)
