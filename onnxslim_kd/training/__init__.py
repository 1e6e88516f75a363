"""Training an ONNX graph; the only package that imports torch."""
