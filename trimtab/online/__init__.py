"""Sample, judge, learn: a source of feedback that refreshes itself."""
