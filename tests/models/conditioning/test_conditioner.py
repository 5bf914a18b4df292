"""The conditioners of the latent diffusion paper's models, on random weights."""

import pytest
import torch
from torch.nn import functional as F
from transformers import BertTokenizer

from models.conditioning.conditioner import ClassConditioner, SegmentationConditioner, TokenConditioner
from models.errors import CheckpointError
from models.spec import ClassSpec, SegmentationSpec, TokenSpec
from tests.checkpoints.tiny import fill_randomly
from tests.helpers.numbers import LIMIT, relative_error
from tests.helpers.reference_token_transformer import reference

TEXT = TokenSpec(vocabulary=40, width=24, layers=3, tokens=77)
BOXES = TokenSpec(vocabulary=64, width=32, layers=2, tokens=92)


def random(network, seed=1):
    fill_randomly(network, seed)
    return network.requires_grad_(False).eval()


@pytest.mark.parametrize("spec", [TEXT, BOXES], ids=["text", "boxes"])
@torch.inference_mode()
def test_context_of_tokens(spec):
    ours = random(TokenConditioner(spec))
    ids = torch.randint(spec.vocabulary, (2, spec.tokens), generator=torch.Generator().manual_seed(0))
    theirs = reference(spec, ours.transformer.state_dict())(
        input_ids=ids, output_attentions=False, output_hidden_states=False, return_dict=True
    ).last_hidden_state
    assert theirs.shape == (2, spec.tokens, spec.width)
    assert relative_error(ours.from_ids(ids), theirs) <= LIMIT


def test_published_keys_of_the_text_transformer():
    keys = TokenConditioner(TEXT).state_dict()
    assert keys["transformer.attn_layers.layers.4.1.to_q.weight"].shape == (512, 24)
    assert "transformer.attn_layers.layers.5.1.net.0.0.weight" in keys
    assert "transformer.attn_layers.layers.0.1.to_q.bias" not in keys


@torch.inference_mode()
def test_prompts_are_berts_tokens_between_begin_and_end(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    conditioner = random(TokenConditioner(TEXT, BertTokenizer.from_pretrained(tmp_path)))
    ids = conditioner.tokenize(["Red apples", "red " * 100])
    assert ids[0].tolist() == [2, 5, 6, 7, 3] + [0] * 72
    assert ids[1].tolist() == [2] + [5] * 75 + [3]
    assert torch.equal(conditioner(["Red apples", "red " * 100]), conditioner.from_ids(ids))


def test_a_missing_vocabulary_is_named():
    with pytest.raises(CheckpointError, match=r"vocab\.txt of bert-base-uncased"):
        TokenConditioner(TEXT)(["red apple"])


@torch.inference_mode()
def test_a_class_is_a_context_of_one_vector():
    conditioner = random(ClassConditioner(ClassSpec(classes=11, width=8)))
    context = conditioner([10, 3])
    assert context.shape == (2, 1, 8)
    assert torch.equal(context[:, 0], conditioner.state_dict()["embedding.weight"][[10, 3]])
    with pytest.raises(IndexError):
        conditioner([11])


@torch.inference_mode()
def test_segmentation_maps_are_halved_and_mixed():
    conditioner = random(SegmentationConditioner(SegmentationSpec(classes=9, channels=3)))
    maps = torch.randint(9, (2, 32, 16), generator=torch.Generator().manual_seed(0))
    x = F.one_hot(maps, 9).movedim(-1, 1).float()
    x = F.avg_pool2d(F.avg_pool2d(x, 2), 2)  # bilinear at half the size, where sides are even
    theirs = F.conv2d(x, conditioner.state_dict()["channel_mapper.weight"])
    assert theirs.shape == (2, 3, 8, 4)
    assert relative_error(conditioner(maps), theirs) <= LIMIT
