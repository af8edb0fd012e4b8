"""Every GPU claim, measured: `python -m benchmarks.gpu`."""
