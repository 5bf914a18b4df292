"""From prompts, classes, boxes and regions to the context of the UNet."""
