"""From a line for trtexec 10, whose flags said what precision to compute in, to a graph that says it itself.

found = migrate("trtexec --onnx=model.onnx --fp16 --saveEngine=model.plan", Path("model.fp16.onnx"))
"""
