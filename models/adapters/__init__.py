"""Adapters, which change a base model: LoRA, textual inversion, a replacement VAE."""
