"""The batch of one iteration: its construction, from deadlines, with drafts."""
