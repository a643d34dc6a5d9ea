"""noisepolicy learns where a frozen diffusion model should start."""
