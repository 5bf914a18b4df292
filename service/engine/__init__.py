"""The batching engine: jobs, the queue and the loop of steps. Pure Python: no torch, no clock, no threads."""
