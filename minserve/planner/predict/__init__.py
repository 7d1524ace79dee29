"""What the planner expects: a batch's seconds, a request's length, a draft's acceptance."""
