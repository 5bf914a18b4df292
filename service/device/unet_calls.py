"""UNet calls of many rows: padded to their sizes, and divided where rows reuse deep features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from models.networks.adapter_inputs import AdapterInputs
from models.networks.deep_features import DeepFeatures
from models.sampling.denoiser import Denoiser
from models.sampling.table import ALPHA, SIGMA, T
from models.transfer import upload
from service.device.graphs import Graphs
from service.device.state import DeepUse, ImageState
from service.device.tensor_tree import padded, rows_of
from service.engine.runner import padded_size


class UNetInputs(NamedTuple):
    """The inputs of a UNet call besides x and t; None if the model has no such input.

    Every tensor, also those inside other fields, has one entry per row.
    """

    tokens: Tensor | None  # (R, L, C): context for cross-attention
    pooled: Tensor | None  # (R, P): added to the timestep embedding
    concat: Tensor | None  # (R, C', h, w): channels concatenated to x
    noise_levels: Tensor | None  # (R,): level of the noise added to the low-resolution image
    guidance: Tensor | None = None  # (R,): the guidance scale, for a UNet that takes it as an input
    adapters: AdapterInputs | None = None  # of controls and reference images; None if no row has any
    keep: tuple[int, ...] = ()  # branches whose deep features the call returns
    branch: int = 0  # of `deep`
    deep: Tensor | None = None  # (R, C, h, w): deep features to reuse
    keys_values: Tensor | None = None  # (R, 2, L, W): of the context, which is not an input then


class UNetRows(NamedTuple):
    """R rows to call a UNet with: x (R, C, h, w), lines of the samplers' tables, and other inputs."""

    x: Tensor
    coeffs: Tensor
    inputs: UNetInputs

    def with_inputs(self, **changes: Any) -> UNetRows:
        return self._replace(inputs=self.inputs._replace(**changes))


class Result(NamedTuple):
    """eps (R, C, h, w), and the deep features of each branch in `keep`, (R, C', h', w') each."""

    eps: Tensor
    kept: tuple[Tensor, ...]


def call_images(
    bundles: Sequence[LatentDiffusion],
    images: Sequence[ImageState],
    uses: Sequence[DeepUse | None],
    lengths: Sequence[int],
    rows: UNetRows,
    size: int,
    sizes: Sequence[int],
    graphs: Graphs,
) -> Tensor:
    """eps (R, C, h, w) of the rows of all images; those that reuse features of a branch have their own call.

    bundles: of each image: mostly one, but after Precision has replaced a model some have the old one, and
    their own call. uses: of deep features, by each image; lengths: rows of each image; size: rows of a call
    for all rows; sizes: rows that a call for some of them can have. Stores the features that images keep.
    """
    parts: dict[tuple[LatentDiffusion, int | None], list[int]] = {}  # model, branch that is reused -> images
    for index, (bundle, use) in enumerate(zip(bundles, uses, strict=True)):
        parts.setdefault((bundle, use.branch if use and use.reuses else None), []).append(index)
    keep = tuple(sorted({use.branch for use in uses if use and not use.reuses}))
    if [*parts] == [(bundles[0], None)] and not keep:
        return call_unet(bundles[0], rows, size, graphs).eps
    starts = list(accumulate(lengths, initial=0))
    results: list[Tensor] = [rows.x] * len(images)
    for (bundle, branch), members in parts.items():
        chosen = torch.tensor([row for image in members for row in range(*starts[image : image + 2])])
        own = rows_of(rows, upload(chosen, rows.x.device))
        if branch is None:
            own = own.with_inputs(keep=keep)
        else:
            deep = torch.cat([deep_of(images[image]) for image in members])
            own = own.with_inputs(branch=branch, deep=deep)
        own_size = size if len(sizes) == 1 else padded_size(len(own.x), sizes)
        result = call_unet(bundle, own, own_size, graphs)
        own_lengths = [lengths[image] for image in members]
        features = dict(zip(own.inputs.keep, (each.split(own_lengths) for each in result.kept), strict=True))
        for place, (image, eps) in enumerate(zip(members, result.eps.split(own_lengths), strict=True)):
            results[image] = eps
            if (use := uses[image]) and not use.reuses:
                images[image].deep = features[use.branch][place].clone()
    return torch.cat(results)


def deep_of(image: ImageState) -> Tensor:
    """The deep features (k, C, h, w) that an image has kept."""
    assert image.deep is not None
    return image.deep


def call_unet(bundle: LatentDiffusion, rows: UNetRows, size: int, graphs: Graphs) -> Result:
    """UNet calls of `size` rows each, the last one filled up with copies of its first row."""
    assert bundle.unet is not None
    assert bundle.denoiser is not None
    run = partial(run_denoiser, bundle.denoiser)
    results: list[Result] = []
    for begin in range(0, len(rows.x), size):
        part = rows_of(rows, slice(begin, begin + size))
        count = len(part.x)
        x, coeffs, inputs = padded(part, size - count)
        result = graphs.run(bundle.unet, run, x, coeffs[:, T], coeffs[:, ALPHA : SIGMA + 1], inputs)
        results.append(rows_of(result, slice(count)))
    kept = zip(*(each.kept for each in results), strict=True)
    return Result(torch.cat([each.eps for each in results]), tuple(map(torch.cat, kept)))


def run_denoiser(
    denoiser: Denoiser, x: Tensor, t: Tensor, signal_and_sigma: Tensor, inputs: UNetInputs
) -> Result:
    """The result of R rows."""
    deep = DeepFeatures(inputs.keep, inputs.branch, inputs.deep)
    eps = denoiser(
        x,
        t,
        inputs.tokens,
        inputs.pooled,
        inputs.concat,
        signal_and_sigma,
        inputs.noise_levels,
        inputs.adapters,
        inputs.guidance,
        deep,
        inputs.keys_values,
    )
    return Result(eps, tuple(deep.kept[branch] for branch in inputs.keep))
