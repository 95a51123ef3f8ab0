"""Verdicts that one can believe: held-out states, films, samples of what was said."""
