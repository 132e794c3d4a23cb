"""Scores and the report of a run, as JSON, Markdown and HTML: pure functions of what is in the run folder."""
