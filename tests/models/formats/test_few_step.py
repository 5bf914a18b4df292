"""Few-step models and LoRAs by their names."""

import pytest

from models.formats.few_step import of_name, predicts_x_0


@pytest.mark.parametrize(
    ("name", "expected"),  # kind, steps, guidance, sampler, spacing, eta
    [
        ("lcm-lora-sdv1-5", ("LCM", 4, 1.0, "lcm", None, 0.0)),
        ("LCM_Dreamshaper_v7", ("LCM", 4, 1.0, "lcm", None, 0.0)),
        ("sd_turbo", ("SD-Turbo", 4, 1.0, "euler_ancestral", "trailing", 0.0)),
        ("sd_xl_turbo_1.0_fp16", ("SDXL-Turbo", 4, 1.0, "euler_ancestral", "trailing", 0.0)),
        ("stabilityai/sdxl-turbo", ("SDXL-Turbo", 4, 1.0, "euler_ancestral", "trailing", 0.0)),
        ("sdxl_lightning_8step_lora", ("Lightning", 8, 1.0, "euler", "trailing", 0.0)),
        ("sdxl_lightning_2step_unet", ("Lightning", 2, 1.0, "euler", "trailing", 0.0)),
        ("juggernautXL_v9Rdphoto2Lightning", ("Lightning", 4, 1.0, "euler", "trailing", 0.0)),
        ("Hyper-SDXL-8steps-lora", ("Hyper-SD", 8, 1.0, "ddim", "trailing", 0.0)),
        ("Hyper-SD15-1step-lora", ("Hyper-SD, 1 step", 1, 1.0, "tcd", None, 1.0)),
        ("Hyper-SDXL-12steps-CFG-lora", ("Hyper-SD with guidance", 12, 5.0, "ddim", "trailing", 0.0)),
        ("TCD-SDXL-LoRA", ("TCD", 4, 1.0, "tcd", None, 0.3)),
        ("dmd2_sdxl_1step_unet_fp16", ("DMD2, 1 step", 1, 1.0, "lcm", "trailing", 0.0)),
        ("Hyper-SDXL-1step-Unet", ("Hyper-SD UNet", 1, 1.0, "lcm", "trailing", 0.0)),
        ("emoji-few-steps", ("progressive distillation", 4, 1.0, "lcm", None, 0.0)),
        ("dmd2_sdxl_4step_lora_fp16", ("DMD2", 4, 1.0, "lcm", "trailing", 0.0)),
    ],
)
def test_published_names(name, expected):
    found = of_name(name)
    assert (
        found.kind,
        found.steps,
        found.guidance_scale,
        found.sampler,
        found.spacing,
        found.eta,
    ) == expected


@pytest.mark.parametrize(
    "name",
    ["sd_xl_base_1.0", "lightningStorm", "volcmodel_v3", "dreamshaperXL_v21TurboDPMSDE", "100stepsToHeaven"],
)
def test_other_names_are_of_no_kind(name):
    assert of_name(name) is None


def test_lightnings_one_step_model_predicts_x_0():
    assert predicts_x_0("sdxl_lightning_1step_x0")
    assert predicts_x_0("sdxl_lightning_1step_unet_x0")
    assert not predicts_x_0("sdxl_lightning_4step")
    assert not predicts_x_0("sd_x0_1step")
