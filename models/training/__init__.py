"""Training of the autoencoder and of the latent diffusion loss; never imported by the serving path."""
