"""Measurements, run through `noisepolicy-bench`; the numbers in the README come from them."""
