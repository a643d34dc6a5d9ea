"""The commands: noisepolicy-train, -generate, -eval, -bench and -reward-server."""
