"""The mathematics: architectures, ACT step, losses."""
