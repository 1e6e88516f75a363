"""Make ONNX models smaller and faster without their source code."""
