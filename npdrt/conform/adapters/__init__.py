"""Other people's optimizers behind one interface: a case in, its answers or a failure out."""
