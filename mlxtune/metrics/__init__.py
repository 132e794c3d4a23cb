"""What is measured, one file per metric: a function from plain figures or texts to a Score. Knows no models, no files."""
