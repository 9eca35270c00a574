"""The configuration: keys, defaults, ranges, presets and the command line."""
