"""Runtimes besides ONNX Runtime: OpenVINO and ExecuTorch."""
