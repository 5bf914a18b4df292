"""What a user puts on top of a base model: LoRA, textual inversion, a replacement VAE."""
