"""The batching engine: the queue and the loop of UNet calls. Pure Python: no torch, no clock, no threads."""
