"""The Images API of OpenAI on the same engine."""
