"""Records to token batches: the chat template, the prompt/completion boundary, truncation, a view of what is trained."""
