"""Every number that the README quotes, measured side by side with a peer in one run."""
