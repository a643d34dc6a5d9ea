"""`noisepolicy-bench latency`: denoisers and whole rollouts on every engine."""
