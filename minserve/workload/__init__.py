"""Load tests of a server: scenarios, traces, an open-loop client, reports and plots."""
