"""Noise schedules, samplers as tables of coefficients, the update step, guidance and the denoiser."""
