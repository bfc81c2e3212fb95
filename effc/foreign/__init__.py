"""ONNX files from elsewhere, read into modules that effc traces like any other."""
