"""Every row of Stable Diffusion and its kin against `diffusers`, from folders that it wrote."""

import json
import re

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file

from models.checkpoint import CheckpointError, load, read_spec, save
from models.conditioning.conditioner import ConditioningInput
from models.latent_diffusion import autoencoder_dtype
from models.spec import ModelSpec
from tests.checkpoints import sd_folders
from tests.helpers.numbers import LIMIT, relative_error

pytestmark = pytest.mark.slow

PROMPT, UNWANTED = "red apple on a blue background!", "blue pear"


@pytest.fixture(scope="module", params=sd_folders.ROWS)
def pair(request, tmp_path_factory):
    """(a row's pipeline, what we load from the folder that it saved)."""
    reference = sd_folders.pipeline(request.param)
    folder = tmp_path_factory.mktemp("reference") / request.param
    reference.save_pretrained(folder)
    return reference, load(folder)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return sd_folders.write(tmp_path_factory.mktemp("reference"), "xl")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts_of(reference):
    """Token vectors and pooled text of (UNWANTED, PROMPT) by `diffusers`."""
    if hasattr(reference, "text_encoder_2"):
        context, null, pooled, null_pooled = reference.encode_prompt(PROMPT, negative_prompt=UNWANTED)
        return torch.cat([null, context]), torch.cat([null_pooled, pooled])
    context, null = reference.encode_prompt(PROMPT, "cpu", 1, True, UNWANTED)
    return torch.cat([null, context]), None


@torch.inference_mode()
def test_context(pair):
    reference, ours = pair
    context, (tokens, pooled) = ours.context_pair(ConditioningInput(PROMPT, UNWANTED)), texts_of(reference)
    assert relative_error(context.tokens, tokens) <= LIMIT
    if pooled is not None:
        assert relative_error(context.pooled[:, : pooled.shape[1]], pooled) <= LIMIT


@torch.inference_mode()
def test_eps(pair):
    reference, ours = pair
    spec, config = ours.spec.unet, reference.unet.config
    x, t = noise(2, spec.in_channels, 8, 16), torch.tensor([1, 801])
    context, given = noise(2, 77, spec.context_width, seed=1), {}
    pooled = level = None
    if spec.noise_levels:
        level = torch.tensor([0, 350])
        given = {"class_labels": level}
    if spec.added_width:
        sizes = torch.tensor([64, 128, 0, 0, 64, 128])
        text = noise(2, spec.added_width - 6 * spec.size_width, seed=2)
        given = {"added_cond_kwargs": {"text_embeds": text, "time_ids": sizes.expand(2, -1)}}
        pooled = torch.cat([text, ours.size_embedding(128, 64).expand(2, -1)], dim=1)
    assert config.cross_attention_dim == spec.context_width
    theirs = reference.unet(x, t, context, **given).sample
    assert relative_error(ours.unet(x, t, context, pooled, level), theirs) <= LIMIT


@torch.inference_mode()
def test_first_stage(pair):
    reference, ours = pair
    z, x = noise(1, 4, 8, 4), torch.rand(1, 3, 64, 32) * 2 - 1
    assert relative_error(ours.autoencoder.decode(z), reference.vae.decode(z).sample) <= LIMIT
    assert relative_error(ours.autoencoder.encode(x), reference.vae.encode(x).latent_dist.mode()) <= LIMIT


@torch.inference_mode()
def test_a_guided_run(pair, monkeypatch):
    """Whole runs from the same noise; the pipeline computes its own unconditional context."""
    reference, ours = pair
    start = {
        "latents": noise(1, 4, 8, 8),
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "output_type": "pt",
    }
    # Their pipelines sample the masked image's latent; ours takes the mode of the distribution.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    if ours.spec.upscaling:
        low, generator = x[:, :, :8, :8], torch.Generator().manual_seed(0)
        torch.randn(4, 8, 8, generator=generator)  # ours draws the start noise before the noise on low
        theirs = reference(PROMPT, low, noise_level=20, generator=generator, **start).images
        image = ours.upscale(2 * low - 1, [0], 3, 20, [PROMPT], 5.0)
    elif ours.spec.mask_channels:
        mask = torch.zeros(1, 1, 64, 64)
        mask[:, :, 8:40, 16:56] = 1
        theirs = reference(PROMPT, image=x, mask_image=mask, strength=1.0, **start).images
        masked = ours.encode_masked(2 * x - 1, mask[0, 0] > 0.5)
        image = ours.sample(
            [PROMPT], [0], 3, 5.0, concat_channels=[ours.concat_channels(8, 8, masked=masked)]
        )
    else:
        theirs = reference(PROMPT, **start).images
        image = ours.sample([PROMPT], [0], 3, 5.0)
    assert relative_error((image / 2 + 0.5).clamp(0, 1), theirs) <= 1e-4


@pytest.mark.slow
@torch.inference_mode()
def test_diffusers_reads_what_is_written(pair, tmp_path):
    reference, ours = pair
    save(ours, tmp_path / "m", torch.float32, shard=1_000_000)
    assert len([*(tmp_path / "m/unet").glob("*-of-*.safetensors")]) > 2
    again = type(reference).from_pretrained(tmp_path / "m", local_files_only=True)
    networks = [name for name, part in reference.components.items() if isinstance(part, torch.nn.Module)]
    for name in networks:
        theirs, written = (getattr(pipeline, name).state_dict() for pipeline in (reference, again))
        assert theirs.keys() == written.keys()
        assert all(torch.equal(value, written[key]) for key, value in theirs.items())
    x, t, context = noise(1, ours.spec.unet.in_channels, 8, 8), torch.tensor([801]), noise(1, 77, 96)
    context, given = context[..., : ours.spec.unet.context_width], {}
    if ours.spec.unet.noise_levels:
        given = {"class_labels": torch.tensor([20])}
    if ours.spec.unet.added_width:
        given = {"added_cond_kwargs": {"text_embeds": noise(1, 24), "time_ids": torch.ones(1, 6)}}
    one, other = (pipeline.unet(x, t, context, **given).sample for pipeline in (reference, again))
    assert relative_error(other, one) <= LIMIT
    loaded = load(tmp_path / "m")
    assert (loaded.spec.unet, loaded.spec.zero_null) == (ours.spec.unet, ours.spec.zero_null)
    assert ModelSpec.from_dict(json.loads(json.dumps(loaded.spec.to_dict()))) == loaded.spec
    contexts = [model.context_pair(ConditioningInput(PROMPT, UNWANTED)) for model in (ours, loaded)]
    assert torch.equal(contexts[0].tokens, contexts[1].tokens)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"variant": "fp16", "max_shard_size": "1MB"}])
def test_variants_and_shards(options, tmp_path):
    reference = sd_folders.pipeline("xl")
    reference.to(torch.float16).save_pretrained(tmp_path, **options)
    loaded, state = load(tmp_path), reference.unet.state_dict()
    assert torch.equal(loaded.unet.state_dict()["out.2.weight"], state["conv_out.weight"].float())
    files = {file.name for file in (tmp_path / "unet").iterdir()}
    assert ("diffusion_pytorch_model.fp16.safetensors" in files) == ("max_shard_size" not in options)


@pytest.fixture
def sharded(xl, tmp_path):
    """A model whose UNet and VAE have several files each."""
    save(load(xl), tmp_path / "m", shard=100_000)
    return tmp_path / "m"


PARTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")


def index_of(folder, part):
    """The index file of a sharded network, and its content."""
    file = folder / f"{part}.safetensors.index.json"
    return file, json.loads(file.read_text())


@pytest.mark.parametrize("part", PARTS)
def test_shards_are_read_strictly(sharded, part):
    file, index = index_of(sharded, part)
    files = index["weight_map"]
    key = min(files)
    first, *others = sorted({files[key], *files.values()}, key=lambda name: name != files[key])
    for name, expected in (
        ("../x.safetensors", "in its folder"),
        (str(file.parent / first), "in its folder"),
        ("..", "in its folder"),
        (3, "in its folder"),
        ("no.safetensors", "no.safetensors is missing"),
        (others[0], "does not match its files: 1 different keys: " + re.escape(key)),
    ):
        file.write_text(json.dumps({"weight_map": files | {key: name}}))
        with pytest.raises(CheckpointError, match=expected):
            load(sharded)
    file.write_text(json.dumps(index))
    shard = file.parent / first
    shard.rename(file.parent / "renamed.safetensors")
    with pytest.raises(CheckpointError, match=f"{first} is missing"):
        load(sharded)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("last", [False, True])
def test_a_tensor_in_two_shards_is_refused(sharded, part, last):
    """Whichever of the two files the index names."""
    file, index = index_of(sharded, part)
    files = index["weight_map"]
    first, *_, final = sorted(set(files.values()))
    named, other = (final, first) if last else (first, final)
    key = next(key for key, name in files.items() if name == named)
    tensors = load_file(file.parent / other)
    save_file(tensors | {key: load_file(file.parent / named)[key]}, file.parent / other)
    with pytest.raises(CheckpointError, match="1 duplicate keys: " + re.escape(key)):
        load(sharded)


def test_pickled_shards_need_to_be_allowed(tmp_path):
    reference = sd_folders.pipeline("sd2-v")
    reference.save_pretrained(tmp_path, safe_serialization=False)
    state = reference.unet.state_dict()
    names, folder = [*state], tmp_path / "unet"
    (folder / "diffusion_pytorch_model.bin").unlink()
    halves = {"diffusion_pytorch_model-00001-of-00002.bin": names[:50],
              "diffusion_pytorch_model-00002-of-00002.bin": names[50:]}  # fmt: skip
    for file, keys in halves.items():
        torch.save({key: state[key].clone() for key in keys}, folder / file)
    where = {key: file for file, keys in halves.items() for key in keys}
    (folder / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(
        CheckpointError, match=r"pickled weights only \(diffusion_pytorch_model\.bin\.index\.json"
    ):
        load(tmp_path)
    unet = load(tmp_path, allow_pickle=True).unet.state_dict()
    assert torch.equal(unet["out.2.weight"], state["conv_out.weight"])


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("model_index.json", {"requires_aesthetics_score": True}, "72 numbers of pooled text"),
        ("model_index.json", {"text_encoder": [None, None]}, "text_encoder"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 2560}, "2560 numbers of pooled text"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type"),
        ("unet/config.json", {"only_cross_attention": True}, "only_cross_attention"),
        ("text_encoder_2/config.json", {"hidden_size": 64}, "the text encoders give 96"),
        ("unet/config.json", {"num_class_embeds": 10}, "noise levels"),
    ],
)
def test_what_does_not_fit_is_named(xl, file, change, named):
    before = (xl / file).read_text()
    try:
        (xl / file).write_text(json.dumps(json.loads(before) | change))
        with pytest.raises(CheckpointError, match=named):
            read_spec(xl)
    finally:
        (xl / file).write_text(before)


@torch.inference_mode()
def test_a_first_stage_that_overflows_has_another_type(xl):
    model = load(xl, dtype=torch.float16)
    assert model.spec.autoencoder.upcast
    assert (model.unet.dtype, model.autoencoder.dtype) == (torch.float16, torch.bfloat16)
    assert model.to(dtype=torch.float16).autoencoder.dtype == torch.bfloat16
    assert model.to(dtype=torch.float32).autoencoder.dtype == torch.float32
    assert autoencoder_dtype(model.spec.autoencoder, None, "cpu") is None
    assert load(xl, dtype=torch.bfloat16).autoencoder.dtype == torch.bfloat16
    z = torch.randn(1, 4, 8, 8)
    assert model.to(dtype=torch.float16).decode(z).isfinite().all()


def test_a_schedule_written_for_another_sampler_is_the_same_schedule(xl):
    before = read_spec(xl).schedule
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    file = xl / "scheduler/scheduler_config.json"
    text = file.read_text()
    try:
        EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1).save_pretrained(
            file.parent
        )
        assert json.loads(file.read_text())["_class_name"] == "EulerDiscreteScheduler"
        assert read_spec(xl).schedule == before
    finally:
        file.write_text(text)
