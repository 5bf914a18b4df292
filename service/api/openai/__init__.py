"""The Images API of OpenAI."""
