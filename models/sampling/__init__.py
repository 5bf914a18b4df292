"""Noise schedules, samplers as tables of coefficients, and the guided denoiser."""
