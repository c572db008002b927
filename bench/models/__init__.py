"""Models: the protocol, the common VAE, and toys with exact answers."""
