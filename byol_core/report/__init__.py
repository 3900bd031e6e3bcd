"""What a person looks at: the page of a run, its curves and its pictures; `python -m byol_core.report`."""
