"""The commands: noisepolicy-train and noisepolicy-bench."""
