"""The library's version; pyproject.toml names the same one, and a test compares them."""

__version__ = "0.1.0"
