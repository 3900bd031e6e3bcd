"""How the pixels of images become batches of two random views."""
