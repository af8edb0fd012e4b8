"""Backends: what runs or lowers a model."""
