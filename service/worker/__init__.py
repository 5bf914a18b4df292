"""The worker process that runs the engine, and the supervisor that watches it."""
