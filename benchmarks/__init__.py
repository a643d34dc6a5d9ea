"""What the numbers in the README come from; run through `noisepolicy-bench`."""
