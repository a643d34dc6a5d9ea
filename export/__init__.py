"""Export of a frozen model's parts to checked ONNX, OpenVINO and TensorRT files. `noisepolicy.engines` runs them."""
