"""Published shapes with random weights: networks and whole images, ours and those of `diffusers`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertTokenizer

from models.checkpoint import tokenizers
from models.conditioning.conditioner import TextConditioner, TokenConditioner
from models.conditioning.text_encoder import TextEncoder
from models.formats.identify import Source
from models.latent_diffusion import LatentDiffusion
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet, timestep_embedding
from models.spec import AutoencoderSpec, Defaults, ModelSpec, ScheduleSpec, TextSpec, TokenSpec, UNetSpec
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.device.select import prepare_for_device
from service.engine.engine import Engine
from service.engine.events import Done
from service.engine.job import Job

PROMPT = "a red apple on a wooden table in the evening"
GUIDANCE = 5.0
BUCKETS = tuple(2**power for power in range(1, 7))


@dataclass(frozen=True)
class Shape:
    """A model, and the batch sizes at which it is timed."""

    spec: ModelSpec
    rows: tuple[int, ...]  # of a UNet call; a guided image is two rows
    images: tuple[int, ...]  # at once, for all other parts


class IncomparableError(Exception):
    """The reference does not support this part in this setting."""


@dataclass(frozen=True)
class Pair:
    """Two implementations of the same work, with comparable results."""

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    flops: int


@dataclass(frozen=True)
class Setting:
    """Device, dtype and options of a pair."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool = False  # diffusers with torch.compile
    steps: int = 0  # of whole images; 0: the model's default


CLIP = TextSpec(vocabulary=49408, width=768, layers=12, heads=12, intermediate=3072, tokens=77)
BIG_CLIP = replace(
    CLIP, width=1280, layers=32, heads=20, intermediate=5120, activation="gelu", pad_id=0, skipped=1,
    final_norm=False, pooled=1280,
)  # fmt: skip
SD15 = ModelSpec(
    name="sd15",
    unet=UNetSpec(
        in_channels=4, out_channels=4, channels=(320, 640, 1280, 1280), res_blocks=2,
        transformer_depth=(1, 1, 1, 0), middle_depth=1, heads=(8, 8, 8, 8), context_width=768,
    ),
    autoencoder=AutoencoderSpec((128, 256, 512, 512), 2, latent_channels=4, scale_factor=0.18215),
    schedule=ScheduleSpec(),
    texts=(CLIP,),
    defaults=Defaults(512, 512, steps=50),
)  # fmt: skip
LDM_TEXT = replace(
    SD15,
    name="ldm-text",
    unet=replace(SD15.unet, context_width=1280),
    texts=(),
    condition=TokenSpec(vocabulary=30522, width=1280, layers=32, tokens=77),
    defaults=Defaults(256, 256, steps=50),
)
SDXL = replace(
    SD15,
    name="sdxl",
    unet=replace(
        SD15.unet, channels=(320, 640, 1280), transformer_depth=(0, 2, 10), middle_depth=10,
        heads=(5, 10, 20), context_width=2048, linear_projection=True, added_width=2816, size_width=256,
    ),
    autoencoder=replace(SD15.autoencoder, scale_factor=0.13025),
    texts=(replace(CLIP, skipped=1, final_norm=False), BIG_CLIP),
    defaults=Defaults(1024, 1024, steps=20),
    zero_null=True,
)  # fmt: skip
SHAPES = {
    "sd15": Shape(SD15, rows=(2, 8, 32), images=(1, 4)),
    "ldm-text": Shape(LDM_TEXT, rows=(2, 8, 32), images=(1, 4)),
    "sdxl": Shape(SDXL, rows=(2, 8), images=(1, 2)),
}


def narrow(shape: Shape) -> Shape:
    """The same structure in few channels and small images."""
    spec = shape.spec
    unet = replace(
        spec.unet,
        channels=tuple(32 * width // spec.unet.channels[0] for width in spec.unet.channels),
        heads=tuple(min(heads, 4) for heads in spec.unet.heads),
        transformer_depth=tuple(min(depth, 2) for depth in spec.unet.transformer_depth),
        middle_depth=min(spec.unet.middle_depth, 2),
    )
    thin = replace(
        spec,
        unet=unet,
        autoencoder=replace(
            spec.autoencoder, channels=tuple(width // 4 for width in spec.autoencoder.channels)
        ),
        texts=tuple(replace(text, layers=2) for text in spec.texts),
        condition=spec.condition and replace(spec.condition, layers=2),
        defaults=replace(spec.defaults, width=64, height=64, steps=5),
    )
    return replace(shape, spec=thin, rows=(2,), images=(1,))


TINY = {name: narrow(shape) for name, shape in SHAPES.items()}


def random_network(kind: Callable[[], nn.Module], setting: Setting, seed: int = 0) -> nn.Module:
    """A network with random parameters: matrices keep their input's scale, norms are near 1."""
    with torch.device("meta"):
        network = kind().to(setting.dtype)
    network = network.to_empty(device=setting.device).requires_grad_(False).eval()
    generator = torch.Generator(setting.device).manual_seed(seed)
    norms = {part.weight for part in network.modules() if isinstance(part, nn.GroupNorm | nn.LayerNorm)}
    tables = {part.weight for part in network.modules() if isinstance(part, nn.Embedding)}
    for parameter in network.parameters():
        fan_in = 1 if parameter in tables or parameter.dim() < 2 else parameter[0].numel()
        size = 0.1 if parameter.dim() < 2 else fan_in**-0.5
        parameter.normal_(1.0 if parameter in norms else 0.0, size, generator=generator)
    return network


def in_served_layout(ours: nn.Module, setting: Setting) -> nn.Module:
    """The network in the memory layout in which it is served; the reference keeps its own."""
    return ours.to(memory_format=torch.channels_last) if setting.device.type == "cuda" else ours


class Method(nn.Module):
    """A network's method as its forward()."""

    def __init__(self, network: nn.Module, method: str) -> None:
        super().__init__()
        self.network, self.method = network, method

    def forward(self, *inputs: Tensor) -> object:
        return getattr(self.network, self.method)(*inputs)


def flops_of(network: nn.Module, *inputs: Tensor | None, method: str = "forward") -> int:
    """Floating point operations of one call, counted on the meta device without computing anything."""
    copy = {f"network.{key}": value.to("meta") for key, value in network.state_dict().items()}
    meta = tuple(x if x is None else x.to("meta") for x in inputs)
    with FlopCounterMode(display=False) as counter:
        torch.func.functional_call(Method(network, method), copy, meta)
    return counter.get_total_flops()


def networks(spec: ModelSpec, part: str, batch: int, setting: Setting) -> Pair:
    """One network. batch: rows of the UNet, images of D and E, prompts of the text encoder."""
    return {"unet": unets, "D": decoders, "E": encoders, "text": texts}[part](spec, batch, setting)


def noise(setting: Setting, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(1)).to(setting.device, setting.dtype)


def latents(spec: ModelSpec, batch: int, setting: Setting) -> Tensor:
    return noise(setting, batch, *spec.latent_shape(spec.defaults.width, spec.defaults.height))


def unet_inputs(spec: ModelSpec, rows: int, setting: Setting) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, t, context and pooled vector of a UNet call."""
    t = torch.linspace(1, 981, rows, device=setting.device).round()
    context = noise(setting, rows, *spec.context_shape)
    if not spec.unet.added_width:
        return latents(spec, rows, setting), t, context, None
    pooled = noise(setting, rows, spec.unet.added_width - 6 * spec.unet.size_width)
    numbers = torch.tensor(sizes(spec), device=setting.device)
    size_embedding = (
        timestep_embedding(numbers, spec.unet.size_width).flatten().to(setting.dtype).expand(rows, -1)
    )
    return latents(spec, rows, setting), t, context, torch.cat([pooled, size_embedding], dim=1)


def sizes(spec: ModelSpec) -> list[int]:
    """SDXL's sizes: original height and width, crop offsets, target height and width."""
    width, height = spec.defaults.width, spec.defaults.height
    return [height, width, 0, 0, height, width]


def unets(spec: ModelSpec, rows: int, setting: Setting) -> Pair:
    from tests.benchmarks import rivals  # imports diffusers, which cuda.py may run without

    ours = random_network(lambda: UNet(spec.unet), setting)
    theirs = rivals.fast(rivals.unet(ours.state_dict(), spec.unet), setting.device, setting.compiled)
    ours = in_served_layout(ours, setting)
    x, t, context, pooled = unet_inputs(spec, rows, setting)
    added = None
    if pooled is not None:
        size_embedding = torch.tensor([sizes(spec)] * rows, device=setting.device)
        text = pooled[:, : spec.unet.added_width - 6 * spec.unet.size_width]
        added = {"text_embeds": text, "time_ids": size_embedding}
    return Pair(
        lambda: ours(x, t, context, pooled),
        lambda: theirs(x, t, context, added_cond_kwargs=added).sample,
        flops_of(ours, x, t, context, pooled),
    )


def autoencoders(spec: ModelSpec, setting: Setting) -> tuple[Autoencoder, nn.Module]:
    from tests.benchmarks import rivals  # imports diffusers, which cuda.py may run without

    ours = random_network(lambda: Autoencoder(spec.autoencoder), setting)
    theirs = rivals.autoencoder(ours)
    ours = in_served_layout(ours, setting)
    for name in ("encoder", "decoder"):
        setattr(theirs, name, rivals.fast(getattr(theirs, name), setting.device, setting.compiled))
    return ours, theirs


def decoders(spec: ModelSpec, batch: int, setting: Setting) -> Pair:
    ours, theirs = autoencoders(spec, setting)
    z = latents(spec, batch, setting)
    flops = flops_of(ours, z, method="decode")
    return Pair(lambda: ours.decode(z), lambda: theirs.decode(z).sample, flops)


def encoders(spec: ModelSpec, batch: int, setting: Setting) -> Pair:
    ours, theirs = autoencoders(spec, setting)
    x = noise(setting, batch, 3, spec.defaults.height, spec.defaults.width)
    flops = flops_of(ours, x, method="encode")
    return Pair(lambda: ours.encode(x), lambda: theirs.encode(x).latent_dist.mode(), flops)


def texts(spec: ModelSpec, batch: int, setting: Setting) -> Pair:
    """The last text encoder: the token vectors that the UNet attends to."""
    from tests.benchmarks import rivals  # imports diffusers, which cuda.py may run without

    whole = conditioner(spec, [None] * max(1, len(spec.texts)), setting)
    ours = whole.encoders[-1] if spec.texts else whole
    network = ours if spec.texts else ours.transformer
    theirs = rivals.fast(rivals.text(ours, setting.device, setting.dtype), setting.device, setting.compiled)
    shape = (batch, network.spec.tokens)
    ids = torch.randint(network.spec.vocabulary, shape, generator=torch.Generator().manual_seed(1))
    ids = ids.to(setting.device)
    hidden = bool(spec.texts and network.spec.skipped)
    return Pair(
        (lambda: ours(ids).tokens) if spec.texts else (lambda: ours.from_ids(ids)),
        lambda: states_of(theirs(input_ids=ids, output_hidden_states=hidden), hidden),
        flops_of(network, ids),
    )


def states_of(out, hidden: bool) -> Tensor:
    """hidden: the penultimate layer's output; else the last layer's, after the norm."""
    return out.hidden_states[-2] if hidden else out[0]


def conditioner(spec: ModelSpec, words: list, setting: Setting) -> TextConditioner | TokenConditioner:
    """A random conditioner. words: one tokenizer per text encoder."""
    if not spec.texts:
        return random_network(lambda: TokenConditioner(spec.condition, words[0]), setting)
    pairs = list(zip(spec.texts, words, strict=True))
    return random_network(
        lambda: TextConditioner([TextEncoder(*pair) for pair in pairs], zero_null=spec.zero_null), setting
    )


def registry_of(model: LatentDiffusion) -> Registry[LatentDiffusion]:
    """A registry of one model that is already loaded."""
    nowhere = Path()
    source = Source(nowhere, "diffusers folder", "random weights", model.spec, nowhere, allow_pickle=False)
    return Registry({model.spec.name: source}, lambda source: model)


def images(spec: ModelSpec, batch: int, setting: Setting) -> Pair:
    """Whole guided images from a prompt, (B, H, W, 3) in [0, 1].

    Ours come from the service's engine, theirs from the pipeline of `diffusers`.
    """
    from tests.benchmarks import rivals  # imports diffusers, which cuda.py may run without

    if setting.dtype == torch.bfloat16 and not spec.texts:
        raise IncomparableError("the pipeline of diffusers makes no images in bfloat16")
    steps = setting.steps or spec.defaults.steps
    words = [tokenizers.clip(text.pad_id) for text in spec.texts] or [bert_tokenizer()]
    unet, autoencoder = (
        random_network(lambda: UNet(spec.unet), setting),
        random_network(lambda: Autoencoder(spec.autoencoder), setting),
    )
    model = LatentDiffusion(spec, unet, autoencoder, conditioner(spec, words, setting))
    pipeline = rivals.pipeline(model, words, setting.compiled)
    runner = TorchRunner(
        registry_of(prepare_for_device(model, setting.device)), BUCKETS, device=setting.device
    )
    size = {"width": spec.defaults.width, "height": spec.defaults.height}
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    starts = [torch.randn(spec.latent_shape(*size.values()), generator=g) for g in generators]
    x_T = torch.stack(starts).to(setting.device, setting.dtype)  # noqa: N806

    def theirs() -> Tensor:
        out = pipeline(
            [PROMPT] * batch, num_inference_steps=steps, guidance_scale=GUIDANCE, latents=x_T,
            output_type="np", **size,
        )  # fmt: skip
        return torch.from_numpy(out.images).mul(255).round() / 255

    ids = torch.zeros(2, spec.context_shape[0], dtype=torch.long, device=setting.device)
    readers = model.conditioner.encoders if spec.texts else [model.conditioner.transformer]
    flops = steps * flops_of(unet, *unet_inputs(spec, 2 * batch, setting))
    flops += flops_of(autoencoder, latents(spec, batch, setting), method="decode")
    flops += sum(flops_of(reader, ids) for reader in readers)
    return Pair(lambda: engine_images(runner, spec, batch, steps), theirs, flops)


def bert_tokenizer() -> BertTokenizer:
    """BERT's tokenizer with a vocabulary of the prompt's words."""
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(PROMPT.split())]
    with TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")
        return BertTokenizer.from_pretrained(folder)


def engine_images(runner: TorchRunner, spec: ModelSpec, batch: int, steps: int) -> Tensor:
    """The images of one job, from an engine on this runner, which keeps its recorded graphs."""
    events = []
    width, height = spec.defaults.width, spec.defaults.height
    engine = Engine(runner, events.append, 2 * batch, 1, time.monotonic)
    engine.submit(
        Job("one", spec.name, PROMPT, "", width, height, steps, GUIDANCE, 0, batch, "ddim", eta=0.0)
    )
    while engine.busy:
        engine.tick()
    if not isinstance(events[-1], Done):
        raise RuntimeError(f"the engine ended with {events[-1]}")
    pixels = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in events[-1].images]
    return torch.stack(pixels).view(batch, height, width, 3) / 255
