"""`noisepolicy-bench algorithms` and `training`: methods side by side, and the default recipe on several seeds.

DDPO, the cross-entropy method and random search are other methods to compare with, each small and whole.
"""
