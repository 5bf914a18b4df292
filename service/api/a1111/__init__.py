"""The API of AUTOMATIC1111 on the same engine."""
