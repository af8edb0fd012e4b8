"""The mathematics of quantization: tensors in, tensors out; no model and no device code."""
