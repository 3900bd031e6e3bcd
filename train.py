"""Train BYOL on a folder of images, without labels.

    python train.py --data ./imgs --epochs 100              a folder of your own
    python train.py                                         the embedded sample, scikit-learn's digits
    python train.py --data ./imgs --epochs 100 --resume     go on after an interruption, exactly
    python train.py --data ./imgs --check                   look at the data, time a few steps, train nothing
"""

if __name__ == "__main__":
    from byol_core.system.signals import end_at_once

    end_at_once()  # before anything that takes time to load

import sys

from byol_core.run.command import main

if __name__ == "__main__":
    sys.exit(main())
