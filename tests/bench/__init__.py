import time

BEGAN = time.monotonic()  # before torch is loaded, which takes seconds
