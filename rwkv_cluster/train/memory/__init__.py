"""Memory of a rank, predicted from the configuration: model states, activations, their peak, what follows from it."""
