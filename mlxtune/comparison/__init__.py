"""Whether tuning was worth it: candidates, what each is asked, how they differ. Knows run folders and models."""
