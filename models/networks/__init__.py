"""The networks: UNet, autoencoder, CLIP text transformer, and the fused kernels that they call."""
