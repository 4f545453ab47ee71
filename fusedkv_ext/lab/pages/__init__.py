"""Generators of the generated parts of documents."""
