"""One puzzle solved and shown step by step."""
