"""`python -m byol_core`: what train.py does, where the package is installed."""

if __name__ == "__main__":
    from byol_core.system.signals import end_at_once

    end_at_once()  # before anything that takes time to load

import sys

from byol_core.run.command import main

if __name__ == "__main__":
    sys.exit(main())
