"""What any program needs: whole files, one-line errors, options, signals, seeds, and several processes."""
