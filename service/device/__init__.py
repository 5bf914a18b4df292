"""What runs on the device: model registry, batches, CUDA graphs, memory and dtypes."""
