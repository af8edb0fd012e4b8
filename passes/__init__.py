"""Passes: what changes a model."""
