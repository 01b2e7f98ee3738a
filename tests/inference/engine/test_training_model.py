"""The engine streams what the training model (megatron) computes of the same real-time sample."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from inference.engine.engine import Engine
from inference.hf.configuration_moss_video import MossVideoConfig
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from moss_train.convert.weights import export
from moss_train.model.frame_plan import plan_frames
from moss_train.model.packed_text import PackedText
from tests.inference.engine.streams import Player, largest_error, make_stream, play
from tests.inference.hf.test_modeling import new_name
from tests.moss_train.model.build import preset, random_model


def hf_config(model) -> MossVideoConfig:
    """The sizes of a preset of conf/model, as config.json has them."""
    vision, text = asdict(model.vision), asdict(model.text)
    rope = text["rope_scaling"]
    rope["original_max_position_embeddings"] = rope.pop("original_max_position")
    return MossVideoConfig(
        vision_config={
            **{k: vision[k] for k in ("hidden_size", "num_global_layers", "image_size")},
            "num_hidden_layers": vision["num_layers"],
            "attention_heads": vision["num_heads"],
            "intermediate_size": vision["mlp_size"],
            "patch_size": vision["patch_size"],
            "vision_output_dim": model.vision.output_size,
            "intermediate_layers_indices": vision["intermediate_layers"],
        },
        text_config={
            **{k: text[k] for k in ("vocab_size", "hidden_size", "cross_attention_layers")},
            "num_hidden_layers": text["num_layers"],
            "num_attention_heads": text["num_heads"],
            "num_key_value_heads": text["num_kv_heads"],
            "intermediate_size": text["mlp_size"],
            "rope_parameters": {"rope_type": "llama3", "rope_theta": text["rope_theta"], **rope},
        },
        pool_mode=model.projector.pool,
        pool_stride=model.projector.stride,
        image_token_index=text["vocab_size"],
        tokens_before_first_frame="zero",
    )


def test_a_streamed_sample_has_the_logits_of_training(groups) -> None:
    architecture = preset("tiny", tokens_before_first_frame="zero")
    architecture = replace(architecture, text=replace(architecture.text, vocab_size=512))
    training = random_model(architecture, groups)
    stream = make_stream(3, frames=5)
    tokens, image_positions = torch.tensor(stream.tokens), torch.tensor(stream.image_positions)
    with torch.no_grad():
        rows = torch.zeros_like(image_positions)
        frames = plan_frames(rows, image_positions, [len(tokens)], len(tokens))
        frames.states = training.encoder(stream.pixels[:, None], torch.ones_like(image_positions))
        wanted = training.chunks[0](PackedText(tokens, [len(tokens)]), frames)

    model = MossVideoForConditionalGeneration(hf_config(architecture))
    model.load_state_dict({new_name(name): value for name, value in export(training).items()})
    player = Player(Engine(model, max_tokens=64, window=8), stream)
    play(player.engine, [player])
    assert wanted.std() > 0.5
    assert largest_error(player, wanted) < 1e-4
