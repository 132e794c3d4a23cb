"""What is measured, one file per metric: a function from figures or texts to a Score. Knows no models or files."""
