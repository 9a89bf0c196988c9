"""Judges: asked about answers, each says what it found, or why it could not."""
