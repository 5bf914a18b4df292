"""LoRA against `diffusers` and `peft`: the same file on the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from peft import LoraConfig, get_peft_model
from torch.nn.functional import conv2d

from models.adapters import lora
from models.adapters.lora_targets import find_layers
from models.checkpoint import CheckpointError, load
from models.conditioning.conditioner import ConditioningInput
from models.formats import keymaps
from models.formats.adapters import METADATA_KEY, read_lora_scales
from models.formats.safetensors import read_safetensors
from tests.checkpoints.lora_files import (
    ATTENTION,
    CONVOLUTIONS,
    KOHYA_XL,
    TEXT,
    as_kohya,
    as_peft,
    random_lora,
    shapes_of,
    write_lora,
)
from tests.checkpoints.sd_folders import write as write_row
from tests.checkpoints.tiny import upscaler_spec

pytestmark = pytest.mark.slow

LIMIT = 1e-5
ASKED = ConditioningInput("red apple", "blue")


@pytest.fixture(scope="module")
def base(tiny):
    return load(tiny)


@pytest.fixture(scope="module")
def changes(tiny):
    return random_lora(shapes_of(tiny, *ATTENTION, *TEXT))


def opened(base, *files):
    """Those of these files, each by its stem."""
    return list(lora.open_loras({f.stem: f for f in files}, {"tiny": base.spec})["tiny"].values())


def with_loras(bundle, *pairs):
    """The model with LoRAs, each with one weight."""
    return lora.apply(bundle, [(each, weight, weight) for each, weight in pairs])


def outputs(bundle):
    """eps and the context."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.inference_mode():
        context = bundle.context_pair(ASKED).tokens
        return bundle.unet(x, torch.tensor([5, 700]), context), context


def pipeline_of(folder):
    return StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False, dtype=torch.float32)


def outputs_of(pipeline):
    """eps and the context, of diffusers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.inference_mode():
        texts = [ASKED.negative_prompt, ASKED.prompt]
        ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        context = pipeline.text_encoder(ids).last_hidden_state
        return pipeline.unet(x, torch.tensor([5, 700]), context).sample, context


def reference(folder, tensors, weight=1.0):
    """The same, with the changes fused."""
    pipeline = pipeline_of(folder)
    pipeline.load_lora_weights(dict(tensors))
    pipeline.fuse_lora(lora_scale=weight)
    return outputs_of(pipeline)


def difference(ours, theirs):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("style", [as_kohya, as_peft])
def test_a_file_changes_the_model_as_diffusers_fuses_it(tiny, base, changes, style, tmp_path):
    (ours,) = opened(base, write_lora(tmp_path / "a.safetensors", style(changes)))
    theirs = reference(tiny, style(changes), 0.7)
    assert difference(outputs(with_loras(base, (ours, 0.7))), theirs) <= LIMIT
    assert difference(outputs(base), theirs) > 0.1


def test_convolutions_change_as_diffusers_fuses_them(tiny, base, tmp_path):
    tensors = as_kohya(random_lora(shapes_of(tiny, *CONVOLUTIONS), seed=1))
    (ours,) = opened(base, write_lora(tmp_path / "c.safetensors", tensors))
    assert {len(change.target.shape) for change in ours.changes} == {2, 4}
    theirs = reference(tiny, tensors)
    assert difference(outputs(with_loras(base, (ours, 1.0))), theirs) <= LIMIT


def test_all_styles_of_names_give_the_same_model(base, changes, tmp_path):
    kohya, peft = as_kohya(changes), as_peft(changes)
    compvis = {native_of(key, base.spec): tensor for key, tensor in kohya.items()}
    assert len(compvis.keys() - kohya.keys()) > 20
    wrapped = {f"base_model.model.{key}": tensor for key, tensor in peft.items()}
    files = [
        write_lora(tmp_path / f"{index}.safetensors", tensors)
        for index, tensors in enumerate((kohya, compvis, peft, wrapped))
    ]
    first, *others = (outputs(with_loras(base, (each, 1.0))) for each in opened(base, *files))
    assert all(difference(other, first) <= 1e-6 for other in others)


def native_of(key: str, spec) -> str:
    """A key of kohya's by CompVis's name of its module, as files of SDXL have it."""
    module, dot, rest = key.partition(".")
    for native, file in keymaps.unet(spec.unet).items():
        theirs = "lora_unet_" + file.replace(".", "_")
        if module.startswith(theirs + "_"):
            return "lora_unet_" + native.replace(".", "_") + module.removeprefix(theirs) + dot + rest
    return key


def test_several_are_added_in_any_order(tiny, base, changes, tmp_path):
    other = random_lora(shapes_of(tiny, "attn1.to_q", "conv1", "mlp.fc2"), seed=2)
    two = {"a": as_peft(changes), "b": as_kohya(other)}
    ours = opened(base, *(write_lora(tmp_path / f"{name}.safetensors", two[name]) for name in two))
    pipeline = pipeline_of(tiny)
    for name, tensors in two.items():
        pipeline.load_lora_weights(dict(tensors), adapter_name=name)
    pipeline.set_adapters([*two], [0.8, -0.5])
    pipeline.fuse_lora(adapter_names=[*two])
    pairs = [*zip(ours, (0.8, -0.5), strict=True)]
    mine = outputs(with_loras(base, *pairs))
    assert difference(mine, outputs_of(pipeline)) <= LIMIT
    assert difference(outputs(with_loras(base, *pairs[::-1])), mine) <= 1e-6


@pytest.mark.parametrize("kind", [{"use_rslora": True}, {"use_dora": True}])
def test_peft_itself_merges_to_the_same_from_its_own_folder(tiny, base, tmp_path, kind):
    unet = pipeline_of(tiny).unet
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["to_q", "conv2"], alpha_pattern={"attn2.to_q": 2}, **kind
    )
    wrapped = get_peft_model(unet, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) / 4
            parameter.data.copy_(1 + noise.abs() if "magnitude" in name else noise)
    wrapped.save_pretrained(tmp_path)
    (ours,) = opened(base, tmp_path / "adapter_model.safetensors")
    merged = wrapped.merge_and_unload()
    x, t, context = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([5, 700]), outputs(base)[1]
    with torch.inference_mode():
        theirs = merged(x, t, context).sample
        assert difference([with_loras(base, (ours, 1.0)).unet(x, t, context)], [theirs]) <= LIMIT


def test_the_alpha_in_the_header_of_diffusers_is_used(base, changes, tmp_path):
    own = json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.lora_alpha": 8})
    tensors = as_peft(changes)
    plain, told = (
        write_lora(tmp_path / "plain.safetensors", tensors),
        write_lora(tmp_path / "told.safetensors", tensors, {METADATA_KEY: own}),
    )
    one, other = opened(base, plain, told)
    twice = with_loras(base, (one, 2.0))
    assert difference(outputs(with_loras(base, (other, 1.0))), outputs(twice)) <= 1e-6


@torch.inference_mode()
def test_keys_and_values_are_those_of_the_changed_weights(base, changes, tmp_path):
    (ours,) = opened(base, write_lora(tmp_path / "a.safetensors", as_peft(changes)))
    unet = with_loras(base, (ours, 1.0)).unet
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, unet.spec.context_width)
    t = torch.tensor([5, 700])
    own, others = (unet(x, t, keys_values=each.keys_values(context)) for each in (unet, base.unet))
    assert difference([own], [unet(x, t, context)]) <= 1e-6
    assert difference([own], [others]) > 0.01


def test_unchanged_weights_are_shared_with_the_unchanged_base(tiny, base, changes, tmp_path):
    before = {key: tensor.clone() for key, tensor in base.unet.state_dict().items()}
    (ours,) = opened(base, write_lora(tmp_path / "a.safetensors", as_peft(changes)))
    changed = with_loras(base, (ours, 1.0))
    targets = {change.target for change in ours.changes}
    for network in ("unet", "conditioner"):
        mine = dict(getattr(changed, network).named_parameters())
        for name, parameter in getattr(base, network).named_parameters():
            changes_it = any((network, name) == target[:2] for target in targets)
            assert (mine[name] is parameter) == (not changes_it)
    assert changed.autoencoder is base.autoencoder
    assert all(torch.equal(before[key], tensor) for key, tensor in base.unet.state_dict().items())
    copied = sum(torch.Size(target.shape).numel() for target in targets)
    assert lora.changed_bytes([ours], torch.float16) == 2 * copied


def test_a_convolution_in_the_middle_is_one_after_the_other(base, tmp_path):
    generator = torch.Generator().manual_seed(4)
    module, weight = (
        "lora_unet_down_blocks_0_resnets_0_conv1",
        base.unet.input_blocks[1][0].in_layers[2].weight,
    )
    down, mid, up = (
        torch.randn(shape, generator=generator) for shape in ((3, 32, 1, 1), (3, 3, 3, 3), (32, 3, 1, 1))
    )
    tensors = {f"{module}.lora_{name}.weight": w for name, w in (("down", down), ("mid", mid), ("up", up))}
    (ours,) = opened(
        base, write_lora(tmp_path / "m.safetensors", tensors | {f"{module}.alpha": torch.tensor(6.0)})
    )
    changed = with_loras(base, (ours, 1.0)).unet.input_blocks[1][0].in_layers[2].weight
    x = torch.randn(1, 32, 8, 8, generator=generator)
    apart = conv2d(conv2d(conv2d(x, down), mid, padding=1), up)
    error = conv2d(x, changed - weight, padding=1) - 2 * apart
    assert (error.norm() / apart.norm()).item() <= 1e-5


TARGET = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
NORM = "lora_unet_mid_block_attentions_0_norm"
PAIR = {f"{TARGET}.lora_down.weight": (2, 64), f"{TARGET}.lora_up.weight": (64, 2)}


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"lora_unet_nowhere.lora_up.weight": (1, 1)}, r"1 unknown keys: lora_unet_nowhere.lora_up"),
        ({f"{TARGET}.lora_other": (1,)}, rf"1 unknown keys: {TARGET}.lora_other"),
        (
            PAIR | {f"{TARGET}.lora_up.weight": (32, 2)},
            rf"1 misshaped keys: {TARGET}.lora_up.weight \(32, 2\)",
        ),
        (PAIR | {f"{TARGET}.lora_down.weight": (3, 64)}, rf"1 misshaped keys: {TARGET}.lora_up.weight"),
        ({f"{TARGET}.lora_up.weight": (64, 2)}, rf"1 incomplete keys: {TARGET}.lora_up.weight"),
        (PAIR | {f"{TARGET}.alpha": (2,)}, rf"1 misshaped keys: {TARGET}.alpha"),
        (PAIR | {f"{TARGET}.lora_A.weight": (2, 64)}, rf"1 repeated keys: {TARGET}.lora_A.weight|lora_down"),
        ({f"{TARGET}.hada_w1_a": (64, 2)}, rf"1 incomplete keys: {TARGET}.hada_w1_a"),
        (PAIR | {f"{TARGET}.diff": (64, 64)}, "3 ambiguous keys"),
        (PAIR | {f"{TARGET}.dora_scale": (32, 1)}, rf"{TARGET}.dora_scale \(32, 1\) \(expected \(64, 1\)\)"),
        ({f"{TARGET}.lokr_w1": (3, 4), f"{TARGET}.lokr_w2": (16, 16)}, r"expected \(0, 16\)"),
        (
            {f"{NORM}.lora_down.weight": (2, 64), f"{NORM}.lora_up.weight": (64, 2)},
            "full differences of a norm",
        ),
        ({f"{TARGET}.oft_blocks": (4, 16, 16)}, "OFT or BOFT, which is not supported"),
        ({f"{TARGET}.weight": (64,), f"{TARGET}.on_input": ()}, "IA3, which is not supported"),
        ({}, "no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(base, tmp_path, shapes, named):
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match=named):
        opened(base, write_lora(tmp_path / "bad.safetensors", tensors))


def test_a_non_finite_alpha_is_refused(base, tmp_path):
    tensors = {name: torch.ones(shape) for name, shape in PAIR.items()}
    file = write_lora(tmp_path / "bad.safetensors", tensors | {f"{TARGET}.alpha": torch.tensor(float("nan"))})
    with pytest.raises(CheckpointError, match="finite"):
        opened(base, file)


def test_modules_that_the_model_does_not_have_are_ignored_with_a_warning(base, changes, tmp_path, caplog):
    tensors = as_kohya(changes)
    more = tensors | {"lora_unet_nowhere.lora_up.weight": torch.ones(1, 1), f"{TARGET}.extra": torch.ones(1)}
    plain, ours = opened(
        base, *(write_lora(tmp_path / f"{n}.safetensors", t) for n, t in (("a", tensors), ("b", more)))
    )
    assert lora.warning("plain", plain) == ""
    text = f"LoRA b: modules that this model does not have are ignored: {TARGET}.extra, lora_unet_nowhere"
    assert lora.warning("b", ours) == text
    assert text in caplog.text
    pairs = zip(outputs(with_loras(base, (ours, 1.0))), outputs(with_loras(base, (plain, 1.0))), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.bfloat16])
def test_alpha_is_a_number_of_any_type(base, dtype, tmp_path):
    tensors = {name: torch.randn(shape) for name, shape in PAIR.items()}
    plain, ours = opened(
        base,
        write_lora(tmp_path / "plain.safetensors", tensors),
        write_lora(
            tmp_path / "typed.safetensors", tensors | {f"{TARGET}.alpha": torch.tensor(4, dtype=dtype)}
        ),
    )
    assert [plain.changes[0].scale, ours.changes[0].scale] == [1.0, 2.0]


def test_text_encoders_and_the_unet_may_have_their_own_weights(base, changes, tmp_path):
    unet, text = ([low for low in changes if (low.network == "unet") == of_unet] for of_unet in (True, False))
    named = {"both": changes, "unet": unet, "text": text}
    both, unet_only, text_only = opened(
        base, *(write_lora(tmp_path / f"{name}.safetensors", as_peft(part)) for name, part in named.items())
    )
    ours = outputs(lora.apply(base, [(both, 0.3, 0.8)]))
    apart = outputs(with_loras(base, (unet_only, 0.3), (text_only, 0.8)))
    assert all(torch.equal(*pair) for pair in zip(ours, apart, strict=True))


@pytest.mark.parametrize(
    "own", ["[]", "[" * 100_000, '{"unet.alpha_pattern": [3]}', '{"unet.alpha_pattern": {"(": 3}}']
)
def test_a_damaged_configuration_in_a_header_is_a_one_line_error(tmp_path, own):
    file = write_lora(tmp_path / "bad.safetensors", {"a": torch.zeros(1)}, {METADATA_KEY: own})
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        read_lora_scales(file, read_safetensors(file))


def test_a_file_belongs_to_every_model_that_it_fits(base, changes, tmp_path):
    file = write_lora(tmp_path / "a.safetensors", as_kohya(changes))
    specs = {"tiny": base.spec, "twin": base.spec, "upscaler": upscaler_spec()}
    assert {model: [*loras] for model, loras in lora.open_loras({"a": file}, specs).items()} == {
        "tiny": ["a"], "twin": ["a"], "upscaler": [],
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"does not fit upscaler: \d+ unknown keys"):
        lora.open_loras({"a": file}, {"upscaler": upscaler_spec()})


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """SDXL's structure: the folder and the model."""
    folder = write_row(tmp_path_factory.mktemp("models"), "xl")
    return folder, load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["kohya", "compvis", "peft"])
def test_a_file_of_sdxl_changes_both_text_encoders_and_the_unet(large, style, tmp_path):
    folder, ours = large
    shapes = shapes_of(folder, "attn2.to_k", "proj_in", "conv1", *TEXT)
    assert [*shapes] == ["unet", "text_encoder", "text_encoder_2"]
    changes = random_lora(shapes)
    tensors = as_peft(changes) if style == "peft" else as_kohya(changes, KOHYA_XL)
    if style == "compvis":
        tensors = {native_of(key, ours.spec): tensor for key, tensor in tensors.items()}
        assert any(key.startswith("lora_unet_input_blocks_4_1_") for key in tensors)
    file = write_lora(tmp_path / "a.safetensors", tensors)
    fitting = lora.open_loras({"a": file}, {"xl": ours.spec})["xl"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, low_cpu_mem_usage=False, dtype=torch.float32)
    # Of CompVis's names diffusers knows those of SDXL's own depth only, which this model has not.
    pipeline.load_lora_weights(as_kohya(changes, KOHYA_XL) if style == "compvis" else dict(tensors))
    pipeline.fuse_lora()
    told, _, pooled, _ = pipeline.encode_prompt("red apple", do_classifier_free_guidance=False)
    generator = torch.Generator().manual_seed(0)
    x, ids = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([[64, 64, 0, 0, 64, 64]])
    t, added = torch.tensor([500]), {"text_embeds": pooled, "time_ids": ids}
    with torch.inference_mode():
        theirs = pipeline.unet(x, t, told, added_cond_kwargs=added).sample
        for weight, same in ((1.0, True), (0.0, False)):
            changed = with_loras(ours, (fitting["a"], weight))
            context = changed.context_pair(ConditioningInput("red apple", size=(64, 64)))
            tokens, extra = context.tokens[1:], context.pooled[1:]
            eps = changed.unet(x, t, tokens, extra)
            pairs = [(eps, theirs), (tokens, told), (extra[:, : pooled.shape[1]], pooled)]
            worst = max(difference([mine], [its]) for mine, its in pairs)
            assert worst <= LIMIT if same else worst > 0.1


def test_names_of_compvis_are_those_of_sdxl(large):
    """At its own depth, as diffusers translates them."""
    shape = {"channels": (32, 64, 96), "heads": (2, 2, 2), "groups": 8}
    depth = {"res_blocks": 2, "transformer_depth": (0, 2, 3), "middle_depth": 3}
    targets = find_layers(replace(large[1].spec, unet=replace(large[1].spec.unet, **shape, **depth)))
    blocks = ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")
    native = [name for name in targets if name.startswith(blocks) and "_transformer_blocks_" in name]
    config = SimpleNamespace(layers_per_block=2)
    theirs = _maybe_map_sgm_blocks_to_diffusers({f"{name}.alpha": name for name in native}, config)
    assert len(theirs) == len(native) > 100
    for name, ours in theirs.items():
        for old, new in (
            ("input_blocks", "down_blocks"),
            ("middle_block", "mid_block"),
            ("output_b", "up_b"),
        ):
            name = name.replace(old, new)  # what it does later
        assert targets[name.removesuffix(".alpha")] == targets[ours]
