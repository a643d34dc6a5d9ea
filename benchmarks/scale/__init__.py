"""`noisepolicy-bench scale` and `sharing`: several processes on a machine, and a machine that others use too."""
