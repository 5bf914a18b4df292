"""Models that come with the package, and their data; found through importlib.resources."""
