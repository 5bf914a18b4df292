"""CLIP text encoders against `transformers`: one, several with pooled text, and SDXL's size conditioning."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from models.checkpoint.parts import count_parameters
from models.conditioning.conditioner import ConditioningInput
from models.conditioning.prompts import PromptOptions
from models.networks.unet import timestep_embedding
from models.spec import ModelSpec
from tests.checkpoints.tiny import random_model, tiny_spec, xl_spec
from tests.helpers.numbers import LIMIT, relative_error

PROMPT = "red apple on a blue background"


@pytest.fixture(scope="module")
def model():
    return random_model(xl_spec())


def reference(encoder):
    """The text transformer of `transformers` with an encoder's weights."""
    spec = encoder.spec
    network = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=spec.vocabulary, hidden_size=spec.width, num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads, intermediate_size=spec.intermediate, hidden_act=spec.activation,
            projection_dim=spec.pooled or 1, eos_token_id=spec.eos_id,
        )
    )  # fmt: skip
    network.text_model.load_state_dict(encoder.transformer.state_dict())
    if spec.pooled:
        network.text_projection.load_state_dict(encoder.text_projection.state_dict())
    return network.eval()


@torch.inference_mode()
def test_tokens_of_all_encoders_and_the_pooled_text_of_the_last(model):
    context = model.context_pair(ConditioningInput(PROMPT, "blue pear"))
    assert (context.tokens.shape, context.pooled.shape) == ((2, 77, 32 + 48), (2, 24 + 6 * 8))
    ids = model.conditioner.tokenize(["blue pear", PROMPT])
    first, second = (
        reference(encoder)(each, output_hidden_states=True)
        for encoder, each in zip(model.conditioner.encoders, ids, strict=True)
    )
    tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    assert relative_error(context.tokens, tokens) <= LIMIT
    assert relative_error(context.pooled[:, :24], second.text_embeds) <= LIMIT


@torch.inference_mode()
def test_the_context_of_one_encoder_matches_transformers():
    conditioner = random_model(tiny_spec()).conditioner
    prompts = [PROMPT, "", "Ünïcode 🍎, long " + "and longer " * 20]
    ids = conditioner.tokenize(prompts)[0]
    theirs = reference(conditioner.encoders[0])(ids).last_hidden_state
    assert relative_error(conditioner(prompts), theirs) <= LIMIT
    assert relative_error(conditioner.from_ids(ids), theirs) <= LIMIT


@torch.inference_mode()
def test_the_size_embedding_follows_the_pooled_text(model):
    sizes = model.context_pair(ConditioningInput(PROMPT, size=(96, 64))).pooled[:, 24:]
    numbers = torch.tensor([64, 96, 0, 0, 64, 96])  # height first: original, crop, target
    assert torch.equal(sizes, timestep_embedding(numbers, 8).flatten().expand(2, -1))
    assert torch.equal(
        model.context_pair(ConditioningInput(PROMPT)).pooled[1, 24:32], timestep_embedding(numbers[:1], 8)[0]
    )


@torch.inference_mode()
def test_an_empty_negative_prompt_is_a_context_of_zeros(model):
    context, with_negative = (
        model.context_pair(ConditioningInput(PROMPT)),
        model.context_pair(ConditioningInput(PROMPT, "blue pear")),
    )
    assert not context.tokens[0].any()
    assert not context.pooled[0, :24].any()
    assert torch.equal(context.pooled[0, 24:], context.pooled[1, 24:])  # the sizes stay
    assert torch.equal(context.tokens[1], with_negative.tokens[1])
    assert with_negative.tokens[0].any()


@torch.inference_mode()
def test_pooled_text_and_size_change_the_unets_prediction(model):
    x, t, context = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([3, 700]),
        model.context_pair(ConditioningInput(PROMPT, "pear")),
    )
    eps = model.unet(x, t, context.tokens, context.pooled)
    assert relative_error(model.unet(x, t, context.tokens, context.pooled.flip(0)), eps) > 0.01
    images = [
        model.sample([ConditioningInput(PROMPT, size=size)], [1], 2, 3.0) for size in ((64, 64), (128, 64))
    ]
    assert relative_error(*images) > 0.001


def test_a_spec_with_several_encoders_survives_a_json_message(model):
    spec = xl_spec()
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    networks = (model.unet, model.autoencoder, model.conditioner)
    assert count_parameters(spec) == sum(p.numel() for network in networks for p in network.parameters())


@torch.inference_mode()
@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_clip_skip_takes_an_earlier_layer_as_transformers_numbers_them(clip_skip):
    spec = tiny_spec()
    spec = replace(spec, texts=(replace(spec.texts[0], layers=4),))
    model = random_model(spec)
    (encoder,) = model.conditioner.encoders
    options = PromptOptions(clip_skip=clip_skip)
    context = model.context_pair(ConditioningInput(PROMPT, prompt_options=options))
    theirs = reference(encoder)
    states = theirs(model.conditioner.tokenize(["", PROMPT])[0], output_hidden_states=True).hidden_states
    assert relative_error(context.tokens, theirs.text_model.final_layer_norm(states[-clip_skip])) <= LIMIT
    assert spec.max_clip_skip == 3


@torch.inference_mode()
def test_clip_skip_counts_from_the_models_own_layer_and_leaves_the_pooled_text():
    spec = replace(xl_spec(), texts=tuple(replace(text, layers=4) for text in xl_spec().texts))
    model = random_model(spec)
    inputs = ConditioningInput(PROMPT, "blue pear")
    context, plain = (
        model.context_pair(inputs._replace(prompt_options=PromptOptions(clip_skip=skip))) for skip in (2, 1)
    )
    ids = model.conditioner.tokenize(["blue pear", PROMPT])
    states = [
        reference(encoder)(each, output_hidden_states=True).hidden_states[-3]
        for encoder, each in zip(model.conditioner.encoders, ids, strict=True)
    ]
    assert relative_error(context.tokens, torch.cat(states, dim=-1)) <= LIMIT
    assert torch.equal(context.pooled, plain.pooled)
    assert spec.max_clip_skip == 2
