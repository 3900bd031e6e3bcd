"""Which images there are, and how one file becomes pixels."""
