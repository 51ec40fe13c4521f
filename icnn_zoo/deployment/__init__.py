"""Networks with learned shapes as standard convolutions, for PyTorch and ONNX."""
