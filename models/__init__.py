"""Latent diffusion models: networks, schedules, samplers and checkpoints. Imports nothing by itself."""
