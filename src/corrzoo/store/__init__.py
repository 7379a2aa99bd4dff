"""Files of trained matchers: checkpoints, saved folders with their model cards, and the authors' released weights."""
