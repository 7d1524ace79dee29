"""The planner's predictions: a batch's seconds, a request's length, a draft's acceptance."""
