"""Visual reinforcement learning with a mixture-of-experts backbone."""
