"""How weights and activations are laid out, gathered and reduced."""
