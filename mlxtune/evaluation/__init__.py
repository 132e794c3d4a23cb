"""How answers count: labels, choices, predictions and what is told from them. Knows samples, not files of data."""
