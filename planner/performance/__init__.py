"""How fast it runs: a step of the engine, serving under load, and training."""
