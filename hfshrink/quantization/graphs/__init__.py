"""ONNX graphs: exported, quantized, and compared with the model that they came from."""
