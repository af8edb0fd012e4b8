"""Kernels, one op a file: specification, kernels, fake."""
