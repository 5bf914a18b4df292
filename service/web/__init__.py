"""Static files that the service serves."""
