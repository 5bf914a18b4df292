"""ControlNet units: what they become in the native request, in the forms that clients send, and refusals."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from models.spec import ControlOption
from service.api.a1111.controlnet import Guides, Target
from service.api.a1111.controlnet_units import ignored_fields, infotext_lines, read_units
from service.errors import InvalidRequest
from service.requests.resolve import build_request, resolve
from service.requests.schemas import GenerateRequest
from service.settings import Settings
from tests.checkpoints.tiny import tiny_spec
from tests.helpers.images import png

SPEC = replace(
    tiny_spec(),
    controls=(
        ControlOption("edges", "ControlNet"),
        ControlOption("union", "ControlNet", types=("openpose", "depth")),
        ControlOption("fill", "ControlNet", inpainting=True),
    ),
    reference_adapters=("style",),
)
SQUARE = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
SENT = png(SQUARE)
UNIT = {"enabled": True, "model": "edges", "module": "none", "image": SENT}
TEXT, IMAGE = Target(SPEC, 64, 64, None, False), Target(SPEC, 64, 64, Image.fromarray(SQUARE), False)
MASKED = IMAGE._replace(inpaints=True)


def guides_of(*units, target: Target = TEXT, name: str = "controlnet") -> Guides:
    return Guides(tuple(read_units({name: {"args": list(units)}}, SPEC, 10**6)), target)


def control_of(unit: dict, target: Target = TEXT) -> dict:
    (control,) = guides_of(unit, target=target).fields()["controls"]
    return control


def refusal_of(unit: dict, target: Target = TEXT) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        guides_of(unit, target=target).fields()
    assert caught.value.message.startswith(caught.value.param)
    return caught.value


def pixels_of(control: dict) -> np.ndarray:
    return np.asarray(control["image"])


def test_fields_that_no_unit_has_are_named_and_others_are_not():
    off = {"enabled": False, "loopback": True}
    on = UNIT | {"loopback": True, "input_image": SENT, "guidance": 1, "processor_res": 64}
    assert ignored_fields({"ControlNet": {"args": [off, on]}}) == [
        "alwayson_scripts.controlnet.args.1.loopback"
    ]


def test_a_unit_is_a_control():
    unit = UNIT | {"weight": 0.7, "guidance_start": 0.1, "guidance_end": 0.8}
    control = control_of(unit | {"control_mode": "My prompt is more important"})
    assert (pixels_of(control) == SQUARE).all()
    del control["image"]
    assert control == {
        "model": "edges", "scale": 0.7, "start": 0.1, "end": 0.8, "mode": "prompt", "type": None
    }  # fmt: skip


@pytest.mark.parametrize(
    "model", ["edges", "edges [0123abcd]", "edges.safetensors", "control/edges.pth [ab]"]
)
def test_a_model_is_named_with_or_without_its_hash_and_suffix(model):
    assert control_of(UNIT | {"model": model})["model"] == "edges"


@pytest.mark.parametrize(
    "form",
    [SENT, {"image": SENT, "mask": None}, [{"image": SENT}], f"data:image/png;base64,{SENT}"],
)
def test_an_image_comes_in_several_forms(form):
    assert (pixels_of(control_of(UNIT | {"image": form})) == SQUARE).all()
    old = {name: value for name, value in UNIT.items() if name != "image"} | {"input_image": form}
    assert (pixels_of(control_of(old)) == SQUARE).all()


def test_arguments_that_are_no_list_are_refused():
    with pytest.raises(InvalidRequest, match="args must be a list of units"):
        read_units({"controlnet": {"args": UNIT}}, SPEC, 10**6)


@pytest.mark.parametrize("script", ["controlnet", "ControlNet"])
def test_units_that_are_off_are_left_out(script):
    off = [
        UNIT | {"enabled": False}, UNIT | {"model": "None"}, None, {"model": "None", "module": "None"}, {}
    ]  # fmt: skip
    assert [unit.number for unit in guides_of(*off, UNIT, name=script).units] == [5]


@pytest.mark.parametrize(
    ("mode", "expected"), [(0, "balanced"), (1, "prompt"), ("ControlNet is more important", "control")]
)
def test_control_modes_have_names_and_old_numbers(mode, expected):
    assert control_of(UNIT | {"control_mode": mode})["mode"] == expected


def test_a_reference_adapter_takes_each_image():
    unit = {"model": "style", "module": "ip-adapter_clip_sd15", "weight": 0.5}
    fields = guides_of(unit | {"image": [{"image": SENT}, {"image": SENT}]}).fields()
    assert fields["controls"] is None
    assert [each["adapter"] for each in fields["reference_images"]] == ["style", "style"]
    assert fields["reference_images"][0]["scale"] == 0.5


def test_a_unit_of_img2img_takes_its_image():
    unit = {"model": "edges", "module": "invert"}
    assert (pixels_of(control_of(unit, IMAGE)) == 255 - SQUARE).all()
    assert refusal_of(unit).param == "alwayson_scripts.controlnet.args.0.image"


def test_an_inpainting_unit_takes_the_masked_image():
    unit = {"model": "fill", "module": "inpaint_only"}
    assert control_of(unit, MASKED)["image"] is None
    assert refusal_of(unit, IMAGE).param == "alwayson_scripts.controlnet.args.0.model"
    assert refusal_of(unit | {"model": "edges"}, MASKED).param == "alwayson_scripts.controlnet.args.0.module"


def test_a_union_control_has_a_type():
    assert control_of(UNIT | {"model": "union", "union_control_type": "Depth"})["type"] == "depth"
    error = refusal_of(UNIT | {"model": "union", "union_control_type": "Unknown"})
    assert error.param == "alwayson_scripts.controlnet.args.0.union_control_type"
    assert "OpenPose, Depth" in error.message


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "other [12345678]"}, "model"),
        ({"module": "openpose_full"}, "module"),
        ({"weight": 3}, "weight"),
        ({"weight": "heavy"}, "weight"),
        ({"guidance_start": 0.9, "guidance_end": 0.1}, "guidance_start"),
        ({"guidance": 2}, "guidance"),
        ({"control_mode": "Loud"}, "control_mode"),
        ({"resize_mode": "Shrink"}, "resize_mode"),
        ({"advanced_weighting": [1.0] * 13}, "advanced_weighting"),
        ({"effective_region_mask": SENT}, "effective_region_mask"),
        ({"hr_option": "Low res only"}, "hr_option"),
        ({"mask": SENT}, "mask"),
        ({"image": {"image": SENT, "mask": SENT}}, "mask"),
        ({"image": [SENT, SENT]}, "mask"),
        ({"image": [{"image": SENT}, {"image": SENT}]}, "image"),
        ({"image": 5}, "image"),
        ({"image": "no base64!"}, "image"),
        ({"image": None}, "image"),
    ],
)
def test_what_would_change_the_image_and_is_not_done_is_refused_by_name(change, field):
    assert refusal_of(UNIT | change).param == f"alwayson_scripts.controlnet.args.0.{field}"


def test_neutral_fields_and_unknown_ones_are_accepted():
    neutral = {
        "low_vram": True, "lowvram": False, "processor_res": -1, "threshold_a": -1, "pixel_perfect": False,
        "hr_option": "Both", "advanced_weighting": None, "effective_region_mask": None, "batch_images": "",
    }  # fmt: skip
    assert control_of(UNIT | neutral)["scale"] == 1.0


def test_control_images_are_appended_unless_the_unit_says_no():
    guides = guides_of(UNIT | {"module": "invert"}, UNIT | {"save_detected_map": False})
    (file,) = guides.maps()
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))) == 255 - SQUARE).all()


def test_the_infotext_of_a_unit_is_the_extensions():
    unit = UNIT | {"module": "canny", "weight": 0.5, "guidance_end": 0.8, "threshold_b": 150}
    guides = guides_of(unit | {"model": "edges [01234567]"}, name="ControlNet")
    request = build_request(GenerateRequest, {"prompt": "apple", **guides.fields()})
    parameters = resolve(request, {"m": SPEC}, Settings()).parameters
    scripts = {"ControlNet": {"args": [None, unit | {"model": "edges [01234567]"}]}}
    assert infotext_lines(scripts, parameters) == {
        "ControlNet 1": "Module: canny, Model: edges, Weight: 0.5, Resize Mode: Crop and Resize, "
        "Processor Res: 512, Threshold A: 100, Threshold B: 150, Guidance Start: 0, Guidance End: 0.8, "
        "Pixel Perfect: False, Control Mode: Balanced"
    }
