"""The mathematics of the models: architectures, ACT step, losses."""
