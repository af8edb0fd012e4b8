"""TensorRT: ONNX in, serialized engines out, and what is known of them without a GPU."""
