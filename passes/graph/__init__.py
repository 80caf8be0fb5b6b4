"""Passes that work on ONNX graphs, and the module that holds one."""
