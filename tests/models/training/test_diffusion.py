"""The loss and the curriculum of the diffusion model's training."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.networks.unet import UNet
from models.sampling.schedule import Schedule
from models.training import diffusion, presets
from models.training.diffusion import Batch, mask_weights, v_error
from models.training.trainer import Budget, Progress


def masked(mask: torch.Tensor) -> Batch:
    return Batch(torch.zeros(len(mask), 8, 4, 4), None, mask, None, None)


def test_errors_inside_the_mask_weigh_more_and_all_alike_without_one() -> None:
    mask = torch.ones(2, 1, 4, 4)
    mask[1, 0, 1:] = 0.0
    everywhere, masked_row = mask_weights(masked(mask))
    assert torch.equal(everywhere, torch.ones(1, 4, 4))
    assert masked_row.mean().item() == pytest.approx(1.0)
    assert masked_row[0, 0, 0] == 10 * masked_row[0, 3, 3]


def test_cell_errors_are_weighted() -> None:
    weight = torch.zeros(1, 1, 4, 4)
    weight[..., 0, 0] = 16.0
    ab, density = torch.full((10,), 0.5), torch.full((10,), 0.1)

    def error(wrong: slice) -> float:
        def predict(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            v = z_t.clone()  # of a image of zeros at this noise: alpha eps
            v[..., wrong, :] += 1.0
            return v

        return v_error(predict, torch.zeros(1, 8, 4, 4), ab, density, weight).item()

    assert error(slice(1, 4)) < 1e-6
    assert abs(error(slice(0, 1)) - 1.0) < 1e-5


def test_spatial_relations_have_a_phase_of_their_own(monkeypatch) -> None:
    count, seen = 12, {}
    number = torch.arange(count)
    cells = number.float().view(-1, 1, 1, 1).expand(-1, 8, 2, 2)
    data = {
        "latents": cells,
        "masked": cells,
        "gray": torch.zeros(1, 8, 2, 2),
        "ids": number.view(-1, 1, 1).expand(-1, 2, 3) + 1,
        "masks": torch.ones(count, 1, 2, 2),
        "boxes": torch.zeros(count, 2, 2),
        "regions": torch.zeros(count, 2, 2),
        "counts": number % 4,
        "has_mask": number < 4,
    }

    class Recorder:
        def __init__(self, *given) -> None:
            self.progress = Progress()

        def run(self, stream, loss, title) -> bool:
            for percent in (5, 35, 80):
                self.progress.seconds = 60 * percent / 100
                seen[percent] = []
                for self.progress.updates in range(16):
                    batch, density = next(stream)
                    seen[percent].append(({int(z) for z in batch.z[:, 0, 0, 0]}, density))
            return True

    monkeypatch.setattr(diffusion, "Trainer", Recorder)
    encoder = SimpleNamespace(tokenize=lambda prompts: torch.zeros(len(prompts), 3, dtype=torch.long))
    network = SimpleNamespace(text_encoder=encoder)
    budget = Budget(minutes=1, learning_rate=1e-3, batch=2)
    diffusion.train(network, presets.SCHEDULE, data, 1.0, budget, Path("state"), torch.device("cpu"))
    relations = {6, 10}  # two objects and no mask
    assert set().union(*(scenes for scenes, _ in seen[5])) == set(range(count))
    assert all(scenes <= relations for scenes, _ in seen[35])
    assert all(scenes <= relations for scenes, _ in seen[80][::4])
    assert set().union(*(scenes for update, (scenes, _) in enumerate(seen[80]) if update % 4)) == set(
        range(count)
    )
    noisy = torch.from_numpy(Schedule(presets.SCHEDULE).alpha_bar < diffusion.RELATIONS_MAX_ALPHA_BAR)
    for density in (seen[35][0][1], seen[80][0][1]):
        assert density.sum().item() == pytest.approx(1.0)
        assert torch.equal(density > 0, noisy)
    assert seen[5][0][1].all()
    assert seen[80][1][1].all()


def test_more_latent_channels_are_ignored_until_they_are_trained() -> None:
    """The wider UNet predicts what the old one did, whatever the new channels hold."""
    few, many, layout = 2, 5, 3
    old, new = (
        UNet(replace(presets.UNET, in_channels=2 * c + 1 + layout, out_channels=c, channels=(32, 32)))
        for c in (few, many)
    )
    diffusion.copy_unet(old, new)
    z, masked = torch.randn(2, 2, many, 8, 8).unbind()
    mask, regions = torch.rand(2, 1, 8, 8), torch.randn(2, layout, 8, 8)
    t, context = torch.tensor([3, 800]), torch.randn(2, 4, presets.CONTEXT_WIDTH)
    with torch.no_grad():
        wide = new(torch.cat([z, mask, masked, regions], 1), t, context)
        narrow = old(torch.cat([z[:, :few], mask, masked[:, :few], regions], 1), t, context)
    assert torch.allclose(wide[:, :few], narrow, atol=1e-5)
    assert torch.equal(wide[:, few:], torch.zeros(2, many - few, 8, 8))
