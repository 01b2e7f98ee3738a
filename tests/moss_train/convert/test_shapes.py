"""Names, shapes and files of the published sizes, without their numbers."""

from __future__ import annotations

import json
from itertools import pairwise
from math import prod

import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

from moss_train.convert.to_hf import Tensors, header, plan_shards
from moss_train.model.hf_mapping import hf_shapes, normalize_name, our_shape, table
from moss_train.model_config import ModelConfig
from tests.moss_train.model.build import preset

GB = 10**9


def by_transformers(model: ModelConfig) -> dict[str, torch.Size]:
    """What transformers' own class would have on the meta device."""
    text, vision = model.text, model.vision
    config = MllamaConfig(
        text_config={
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_layers,
            "cross_attention_layers": list(text.cross_attention_layers),
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "intermediate_size": text.mlp_size,
        },
        vision_config={"image_size": vision.image_size},  # the rest is its default
    )
    with torch.device("meta"):
        built = MllamaForConditionalGeneration(config)
    return {normalize_name(name): tensor.shape for name, tensor in built.named_parameters()}


@pytest.mark.parametrize(("name", "parameters"), [("11b", 10.67e9), ("90b", 88.6e9)])
def test_the_table_has_what_transformers_has(name, parameters):
    model = preset(name)
    mine: dict[str, torch.Size] = {}
    for rule in table(model):
        mine |= hf_shapes(model, rule)
        assert prod(our_shape(model, rule)) == sum(map(prod, hf_shapes(model, rule).values()))
    assert mine == by_transformers(model)
    assert sum(map(prod, mine.values())) == pytest.approx(parameters, rel=1e-3)


def test_files_of_90b_hold_every_byte_once():
    model = preset("90b")
    groups = [
        Tensors(rule, {n: (shape, torch.bfloat16) for n, shape in hf_shapes(model, rule).items()})
        for rule in table(model)
    ]
    shards = plan_shards(groups, 5 * GB)
    sizes = [shard.bytes for shard in shards]
    assert 36 <= len(shards) <= 40
    assert max(sizes) <= 5 * GB
    assert sum(sizes) == 2 * sum(prod(s) for s in by_transformers(model).values())
    names: set[str] = set()
    for shard in shards:
        raw = header(shard)
        length = int.from_bytes(raw[:8], "little")
        assert len(raw) == 8 + length
        assert length % 8 == 0
        entries = json.loads(raw[8:])
        assert entries.pop("__metadata__") == {"format": "pt"}
        places = [entry["data_offsets"] for entry in entries.values()]
        assert [places[0][0], places[-1][1]] == [0, shard.bytes]
        assert all(one[1] == other[0] for one, other in pairwise(places))
        assert not names & entries.keys()
        names |= entries.keys()
    assert names == by_transformers(model).keys()
