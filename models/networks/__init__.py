"""The networks: UNet, autoencoder, text transformers and fused kernels. Nothing here reads files."""
