"""Training a noise policy: settings, the loop, the reward critic, checkpoints."""
