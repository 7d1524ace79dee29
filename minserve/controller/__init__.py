"""The controller: several replicas of an engine that act as one."""
