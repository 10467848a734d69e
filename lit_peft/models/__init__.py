"""Base models: finding, building, loading, quantizing and tokenizing them, and the structure of their layers."""
