"""Webhooks: a client's URL is called with the end of its job."""
