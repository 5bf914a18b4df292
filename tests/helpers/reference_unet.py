"""A second implementation of the paper's UNet, computed from a dict of tensors by their published names."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from models.formats import keymaps
from models.spec import UNetSpec

GROUPS = 8


def spec(
    multiples, attends, heads, context=0, latent=3, concat=0, depth=1, updown=False, scale_shift=False
) -> UNetSpec:
    """16 channels at level 0; `attends` holds downsampling factors, as the published configurations do."""
    channels = tuple(16 * m for m in multiples)
    return UNetSpec(
        in_channels=latent + concat, out_channels=latent, channels=channels, res_blocks=2,
        transformer_depth=tuple(depth * (2**level in attends) for level in range(len(channels))),
        middle_depth=depth, heads=tuple(heads(c) for c in channels), context_width=context, groups=GROUPS,
        residual_resampling=updown, scale_shift_norm=scale_shift,
    )  # fmt: skip


def four_wide(c):
    """Number of heads of 4 channels."""
    return c // 4


def eight(c):
    """8 heads at every level."""
    return 8


ROWS = {
    "celebahq": spec((1, 2, 3, 4), (8, 4, 2), four_wide),
    "lsun_churches": spec((1, 2, 2, 4, 4), (1, 2, 4, 8), eight, latent=4, updown=True, scale_shift=True),
    "cin256": spec((1, 2, 4), (4, 2, 1), four_wide, context=12, latent=4),
    "cin256-v2": spec((1, 2, 3, 5), (8, 4, 2), lambda c: 1, context=12),
    "text2img256": spec((1, 2, 3, 5), (8, 4, 2), four_wide, context=20),
    "txt2img-1p4B": spec((1, 2, 4, 4), (4, 2, 1), eight, context=24, latent=4),
    "inpainting_big": spec((1, 2, 3, 4), (8, 4, 2), eight, concat=4, updown=True),
    "bsr_sr": spec((1, 2, 2, 4), (16, 8), four_wide, concat=3),
    "layout2img": spec((1, 2, 3, 4), (8, 4, 2), four_wide, context=12, depth=3),
    "semantic_synthesis": spec((1, 4, 8), (32, 16, 8), eight, concat=3),
    "rdm768": spec((1, 2, 3, 4), (4, 2, 1), four_wide, context=12, latent=16),
}


class Reference:
    """A UNet computed from tensors by their published names."""

    def __init__(self, weights, spec):
        self.w, self.spec = weights, spec
        self.heads = dict(zip(spec.channels, spec.heads, strict=True))

    def has(self, name):
        return any(key.startswith(name + ".") for key in self.w)

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].flatten(1).T + self.w.get(f"{name}.bias", 0)

    def conv(self, x, name, **options):
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], padding=weight.shape[-1] // 2, **options)

    def norm(self, x, name, eps):
        y = x.unflatten(1, (self.spec.groups, -1)).flatten(2)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return y.view_as(x) * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def res(self, x, emb, name, resize):
        h = resize(F.silu(self.norm(x, f"{name}.in_layers.0", 1e-5)))
        h = self.conv(h, f"{name}.in_layers.2")
        e = self.linear(F.silu(emb), f"{name}.emb_layers.1")[..., None, None]
        if self.spec.scale_shift_norm:
            width = h.shape[1]
            h = self.norm(h, f"{name}.out_layers.0", 1e-5) * (1 + e[:, :width]) + e[:, width:]
        else:
            h = self.norm(h + e, f"{name}.out_layers.0", 1e-5)
        h = self.conv(F.silu(h), f"{name}.out_layers.3")
        x = resize(x)
        return h + (self.conv(x, f"{name}.skip_connection") if self.has(f"{name}.skip_connection") else x)

    def self_attention(self, x, name):
        b, c, *size = x.shape
        heads, n = self.heads[c], size[0] * size[1]
        qkv = self.linear(self.norm(x, f"{name}.norm", 1e-5).reshape(b, c, n).transpose(1, 2), f"{name}.qkv")
        out = []
        for one in qkv.chunk(heads, dim=-1):
            q, k, v = one.chunk(3, dim=-1)
            scale = q.shape[-1] ** -0.25
            out.append(((q * scale) @ (k * scale).transpose(1, 2)).softmax(-1) @ v)
        return x + self.linear(torch.cat(out, -1), f"{name}.proj_out").transpose(1, 2).reshape(x.shape)

    def layer_norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def attend(self, x, context, heads, name):
        q, k, v = (self.linear(y, f"{name}.to_{p}") for y, p in ((x, "q"), (context, "k"), (context, "v")))
        parts = zip(*(y.chunk(heads, -1) for y in (q, k, v)), strict=True)
        out = [(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in parts]
        return self.linear(torch.cat(out, -1), f"{name}.to_out.0")

    def transformer(self, x, context, name):
        heads = self.heads[x.shape[1]]
        y = self.conv(self.norm(x, f"{name}.norm", 1e-6), f"{name}.proj_in").flatten(2).transpose(1, 2)
        index = 0
        while self.has(block := f"{name}.transformer_blocks.{index}"):
            h = self.layer_norm(y, f"{block}.norm1")
            y = y + self.attend(h, h, heads, f"{block}.attn1")
            y = y + self.attend(self.layer_norm(y, f"{block}.norm2"), context, heads, f"{block}.attn2")
            h, gate = self.linear(self.layer_norm(y, f"{block}.norm3"), f"{block}.ff.net.0.proj").chunk(2, -1)
            y = y + self.linear(h * F.gelu(gate), f"{block}.ff.net.2")
            index += 1
        return x + self.conv(y.transpose(1, 2).reshape(x.shape), f"{name}.proj_out")

    def stage(self, x, emb, context, name, resize_at=(), resize=None):
        index = 0
        while self.has(part := f"{name}.{index}"):
            if self.has(f"{part}.in_layers"):
                x = self.res(x, emb, part, resize if index in resize_at else lambda y: y)
            elif self.has(f"{part}.qkv"):
                x = self.self_attention(x, part)
            elif self.has(f"{part}.transformer_blocks"):
                x = self.transformer(x, context, part)
            elif self.has(f"{part}.op"):
                x = self.conv(x, f"{part}.op", stride=2)
            elif self.has(f"{part}.conv"):
                x = self.conv(twice(x), f"{part}.conv")
            else:
                x = self.conv(x, part)
            index += 1
        return x

    def __call__(self, x, t, context):
        half = self.spec.channels[0] // 2
        angles = t.float()[:, None] * torch.tensor([10000 ** (-i / half) for i in range(half)])
        emb = torch.cat([angles.cos(), angles.sin()], 1)
        emb = self.linear(F.silu(self.linear(emb, "time_embed.0")), "time_embed.2")
        skips, index = [], 0
        while self.has(name := f"input_blocks.{index}"):
            x = self.stage(x, emb, context, name, (0,) if index and index % 3 == 0 else (), half_of)
            skips.append(x)
            index += 1
        x, index = self.stage(x, emb, context, "middle_block"), 0
        while self.has(name := f"output_blocks.{index}"):
            x = self.stage(torch.cat([x, skips.pop()], 1), emb, context, name, (1, 2), twice)
            index += 1
        return self.conv(F.silu(self.norm(x, "out.0", 1e-5)), "out.2")


def twice(x):
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def half_of(x):
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def as_diffusers(weights, spec):
    """Weights under the names of `diffusers`' unconditional UNet, with separate q, k and v."""
    out = {}
    heads = dict(zip(spec.channels, spec.heads, strict=True))
    for key, value in weights.items():
        name = keymaps.rename(key, keymaps.unet(spec))
        if name.endswith(("qkv.weight", "qkv.bias")):
            parts = value.reshape(heads[len(value) // 3], 3, -1, *value.shape[1:2]).unbind(1)
            for part, letter in zip(parts, "qkv", strict=True):
                out[name.replace("qkv", f"to_{letter}")] = part.reshape(-1, *value.shape[1:2])
        elif "attentions" in name:
            out[name.replace(".norm.", ".group_norm.").replace("proj_out", "to_out.0")] = value.squeeze(-1)
        else:
            out[name] = value
    return out
