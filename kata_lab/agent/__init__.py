"""The host's side of the agent in the guest."""
