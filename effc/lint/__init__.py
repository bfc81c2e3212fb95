"""What a quantised ONNX file loses on a runtime, before it runs: rules, each tried on the runtime that it is of.

found = check(Path("model.onnx"), chosen("ort"))
"""
