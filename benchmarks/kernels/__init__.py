"""`noisepolicy-bench kernels`: the ops on every backend."""
