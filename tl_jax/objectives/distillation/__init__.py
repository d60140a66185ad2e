"""Knowledge distillation: a wrapper, `distilled.py`, and the terms that it weighs, one family a file."""
