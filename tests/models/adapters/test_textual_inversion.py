"""Learned words, against `diffusers`, and in every form of file."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from models.adapters import textual_inversion
from models.checkpoint import load, save
from models.conditioning.conditioner import ConditioningInput
from models.errors import CheckpointError
from tests.checkpoints.tiny import random_model, tiny_model, tiny_spec, xl_spec


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_contexts_are_those_of_diffusers(tmp_path, vectors, count):
    save(tiny_model(), tmp_path / "tiny", torch.float32)
    file = tmp_path / "mycat.safetensors"
    save_file({"mycat": vectors[:count].contiguous()}, file)
    ours = textual_inversion.add_embeddings(
        load(tmp_path / "tiny"), [textual_inversion.read_embedding("mycat", file)]
    )
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "tiny", safety_checker=None)
    plain, _ = theirs.encode_prompt("a photo of mycat", "cpu", 1, False)
    theirs.load_textual_inversion(str(file), token="mycat")
    for prompt in ("a photo of mycat", "mycat on a mycat", "x " * 37 + "mycat and more"):
        context, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
        mine = ours.conditioner([prompt])
        assert ((mine - context).norm() / context.norm()).item() <= 1e-5
    assert not torch.allclose(ours.conditioner(["a photo of mycat"]), plain, atol=1e-2)


FORMS = {
    "named.safetensors": lambda v: {"<cat-toy>": v},
    "params.safetensors": lambda v: {"emb_params": v},
    "bin.bin": lambda v: {"<cat-toy>": v},
    "web.pt": lambda v: {
        "string_to_token": {"*": 265}, "string_to_param": {"*": v}, "name": "cat", "step": 500,
        "sd_checkpoint": None, "sd_checkpoint_name": None,
    },
    # As the authors' program of 2022 saves it.
    "2022.pt": lambda v: {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(v)}),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_is_read(tmp_path, vectors, name):
    file, content = tmp_path / name, FORMS[name](vectors)
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
        with pytest.raises(CheckpointError, match="allow_pickle"):
            textual_inversion.read_embedding("cat", file)
    assert torch.equal(textual_inversion.read_embedding("cat", file, allow_pickle=True).vectors[0], vectors)


@pytest.mark.parametrize("names", textual_inversion.ENCODER_KEYS)
@torch.inference_mode()
def test_an_embedding_of_existing_vectors_gives_the_same_context(tmp_path, names):
    model = random_model(xl_spec())
    ids = model.conditioner.encoders[0].tokenize(["cat"])[0, 1:4]
    pair = {
        key: encoder.transformer.embeddings.token_embedding.weight[ids].clone()
        for key, encoder in zip(names, model.conditioner.encoders, strict=True)
    }
    save_file(pair, tmp_path / "pair.safetensors")
    before = model.context_pair(ConditioningInput("a cat here", "cat"))
    textual_inversion.add_embeddings(
        model, [textual_inversion.read_embedding("Thing", tmp_path / "pair.safetensors")]
    )
    after = model.context_pair(ConditioningInput("a thing here", "THING"))
    torch.testing.assert_close(after.tokens, before.tokens)
    torch.testing.assert_close(after.pooled, before.pooled)
    assert torch.equal(
        model.copy(torch.float32).context_pair(ConditioningInput("a thing here", "THING")).tokens,
        after.tokens,
    )


def test_a_wrong_width_names_both(tmp_path):
    save_file({"emb_params": torch.ones(2, 48)}, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="48 wide; tiny takes 32, xl takes 32 and 48"):
        textual_inversion.read_embeddings({"w": tmp_path / "wide.safetensors"}, [tiny_spec(), xl_spec()])


ONES = torch.ones(2, 32)
ODD = [{"a": ONES, "b": ONES}, {"a": ONES[None]}, {"a": ONES.int()}, {"a": ONES * float("nan")}]


@pytest.mark.parametrize("content", ODD)
def test_other_tensors_are_refused(tmp_path, content):
    save_file({key: value.clone() for key, value in content.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="embedding w"):
        textual_inversion.read_embedding("w", tmp_path / "odd.safetensors")
