"""The latent diffusion service. Imports nothing by itself."""
