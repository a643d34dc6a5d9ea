"""Programs that noisepolicy plugs into, each in a folder of its own."""
