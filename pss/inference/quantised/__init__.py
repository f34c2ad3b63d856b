"""ONNX files with weights of 8 bits: made of exported ones, and held against them in accuracy and speed."""
