"""From prompts, classes, boxes and segmentation maps to the UNet's context and concat channels."""
